"""Read prompts to answer, each with the right answer where there is one.

In: what `--data` names (files, folders, globs, Hub ids or built-in data). Out: `PromptRow` objects,
equal prompts once. What stands in a row decides what is asked: `messages` up to the assistant's
last turn, `prompt`, `instruction` with its `input`, or `question`. Plain text is a prompt a line.

In: one file, for commands that write an answer to each of its rows. Out: `Ask` objects.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from llmctl.console import log
from llmctl.data.documents import hash_text
from llmctl.data.rows import checked_text, listed, opened, parse_row, read_lines, read_records
from llmctl.data.schemas import ROLES, Message, conversation, from_json
from llmctl.data.sources import Source, find_sources
from llmctl.errors import DataError
from llmctl.files import sha256_file

ChatMessage = dict[str, str]

ASKED = ("prompt", "instruction", "question")
ANSWERS = ("answer", "response", "completion", "output", "chosen")
VAL_SIZE, VAL_FRACTION, FEWEST = 64, 0.1, 20


@dataclass(frozen=True)
class Ask:
    """One prompt as it was given."""

    prompt: str | list[ChatMessage]
    """Text, or the messages of a conversation."""
    name: str
    """What messages call it: `prompt 3`, or the file and line."""


def read_asks(file: Path) -> list[Ask]:
    """The prompts of a file: jsonl with `prompt` or `messages`, or one per line of any other.

    Raises:
        DataError: unreadable, not UTF-8, empty, or a row that holds no prompt.
    """
    asks = []
    for number, line in filled_lines(file):
        if file.suffix in (".jsonl", ".json"):
            asks.append(ask_of(parse_row(line, str(file), number), file, number))
        else:
            asks.append(Ask(line, f"{file}:{number}"))
    if not asks:
        raise DataError("no prompts in this file", file=file)
    return asks


def ask_of(row: dict[str, Any], file: Path, number: int) -> Ask:
    """The prompt of a row of jsonl.

    Raises:
        DataError: it holds none.
    """
    prompt: Any = row.get("messages", row.get("prompt"))
    if isinstance(prompt, list):
        _check_messages(prompt, file, number)
    elif not isinstance(prompt, str):
        raise DataError("a row needs `prompt` (text) or `messages`", file=file, line=number)
    return Ask(prompt, f"{file}:{number}")


def filled_lines(file: Path) -> Iterator[tuple[int, str]]:
    """1-based number and text of the lines that are not blank, without their ends.

    Raises:
        DataError: unreadable, or not UTF-8.
    """
    try:
        with file.open("rb") as stream:
            for number, line in read_lines(stream, str(file)):
                if line.strip():
                    yield number, line.rstrip("\r\n")
    except OSError as error:
        raise DataError(f"cannot read: {error.strerror}", file=file) from None


def _check_messages(messages: list[Any], file: Path, number: int) -> None:
    for message in messages:
        well_formed = isinstance(message, dict) and isinstance(message.get("content"), str)
        if not well_formed or message.get("role") not in ROLES:
            raise DataError(
                f"a message needs a `role` of {', '.join(sorted(ROLES))} and a `content` of text",
                file=file,
                line=number,
            )
    if not messages:
        raise DataError("`messages` is empty", file=file, line=number)


@dataclass(frozen=True)
class PromptRow:
    """One prompt."""

    prompt: str | tuple[Message, ...]
    """Text, or the messages of a conversation that ends before the assistant's turn."""
    answer: str | None
    """What is right, where the row says it."""
    place: str
    line: int | None

    @property
    def name(self) -> str:
        """Where it stands, as messages say it."""
        return self.place if self.line is None else f"{self.place}:{self.line}"

    @property
    def text(self) -> str:
        """What is asked, as a person would read it."""
        return self.prompt if isinstance(self.prompt, str) else str(self.prompt[-1]["content"])

    @property
    def is_single(self) -> bool:
        """Whether it is one text, and not a conversation."""
        return isinstance(self.prompt, str) or len(self.prompt) == 1

    def digest(self) -> int:
        """A hash of the prompt alone."""
        said = self.prompt if isinstance(self.prompt, str) else repr([*map(_said, self.prompt)])
        return hash_text(said.encode())


@dataclass(frozen=True)
class PromptSet:
    """Prompts that train, and prompts that are held out."""

    train: list[PromptRow]
    val: list[PromptRow]
    inputs: list[dict[str, Any]]
    """For the manifest."""


def read_prompts(
    data: Sequence[str], val_data: Sequence[str], val_size: int | None, skip_bad_rows: int = 0
) -> PromptSet:
    """Read every prompt, and hold some out.

    Args:
        data: names of prompts to train on.
        val_data: of those to hold out, in place of a share.
        val_size: how many to hold out; None for a tenth, at most 64.
        skip_bad_rows: rows that may be left out for their errors.

    Raises:
        DataError: rows without a prompt, with file and line; or none left on one side.
        NetworkError: a Hub data set that cannot be reached.
    """
    bad: list[DataError] = []

    def tolerate(error: DataError) -> None:
        bad.append(error)
        if len(bad) > skip_bad_rows:
            raise error

    with tempfile.TemporaryDirectory(prefix="llmctl-") as spool:
        rows, inputs = _read(data, Path(spool), tolerate, "data")
        held, others = _read(val_data, Path(spool), tolerate, "validation")
    if bad:
        first = str(bad[0]).splitlines()[0]
        log.warning("left out %s rows without a prompt, the first: %s", f"{len(bad):,}", first)
    if held:
        known = {row.digest() for row in held}
        return PromptSet([row for row in rows if row.digest() not in known], held, inputs + others)
    train, val = _hold_out(rows, val_size)
    return PromptSet(train, val, inputs)


def _hold_out(rows: list[PromptRow], size: int | None) -> tuple[list[PromptRow], list[PromptRow]]:
    """Those with the smallest hashes are held out, whatever the order."""
    if size is None:
        size = 0 if len(rows) < FEWEST else min(VAL_SIZE, int(VAL_FRACTION * len(rows)))
    if size >= len(rows):
        raise DataError(
            f"{size:,} prompts to hold out, but there are only {len(rows):,}",
            hint="pass a smaller --val-size, or --val-data FILE",
        )
    held = {row.digest() for row in sorted(rows, key=PromptRow.digest)[:size]}
    return (
        [row for row in rows if row.digest() not in held],
        [row for row in rows if row.digest() in held],
    )


def _read(
    names: Sequence[str], spool: Path, tolerate: Any, role: str
) -> tuple[list[PromptRow], list[dict[str, Any]]]:
    found: dict[int, PromptRow] = {}
    inputs = []
    repeated = 0
    for source in find_sources(names, spool):
        count = len(found) + repeated
        for row in _rows(source, tolerate):
            repeated += row.digest() in found
            found.setdefault(row.digest(), row)
        if len(found) + repeated == count:
            raise DataError("no prompt in it", file=source.name)
        inputs.append(_input(role, source, list(found.values())))
    if repeated:
        log.info("left out %s prompts that stand more than once", f"{repeated:,}")
    return list(found.values()), inputs


def _rows(source: Source, tolerate: Any) -> Iterator[PromptRow]:
    if source.kind == "text":
        with opened(source) as file:
            for number, line in read_lines(file, source.name):
                if line.strip():
                    yield PromptRow(line.rstrip("\r\n"), None, source.name, number)
        return
    for record in read_records(source, on_bad=tolerate):
        try:
            yield _row(record.row, record.place, record.line)
        except DataError as error:
            error.file, error.line = record.place, record.line
            tolerate(error)


def _row(row: dict[str, Any], place: str, line: int | None) -> PromptRow:
    for name in ("messages", "conversations"):
        if name in row:
            return PromptRow(*_asked(conversation(row[name], name), name), place, line)
    there = [name for name in ASKED if name in row]
    if not there:
        raise DataError(
            f"no prompt in these columns: {listed(list(row))}",
            hint=f"it takes `messages`, {listed(ASKED)}",
        )
    name = there[0]
    answer = next((row[name] for name in ANSWERS if isinstance(row.get(name), str)), None)
    asked = from_json(row[name])
    if isinstance(asked, list):
        prompt, said = _asked(conversation(asked, name), name)
        return PromptRow(prompt, answer or said, place, line)
    text = checked_text(asked, name)
    extra = row.get("input") if name == "instruction" else None
    if extra is not None and checked_text(extra, "input").strip():
        text = f"{text}\n\n{extra}"
    if not text.strip():
        what = "empty" if not text else "nothing but white space"
        raise DataError(f"`{name}` is {what}: there is nothing to answer")
    return PromptRow(text, answer, place, line)


def _asked(messages: list[Message], name: str) -> tuple[tuple[Message, ...], str | None]:
    """The conversation before the assistant's last turn, and that turn where there is one."""
    answer = None
    if messages and messages[-1]["role"] == "assistant":
        *messages, last = messages
        answer = str(last["content"])
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise DataError(f"`{name}` holds no turn of the user to answer")
    return tuple(messages), answer


def _said(message: Message) -> tuple[str, str]:
    return message["role"], str(message["content"])


def _input(role: str, source: Source, rows: list[PromptRow]) -> dict[str, Any]:
    entry = {"role": role, "path": source.name}
    if source.revision is not None:
        return {**entry, "sha256": None, "revision": source.revision}
    if source.path is not None:
        return {**entry, "sha256": sha256_file(source.path)}
    digest = sha256(" ".join(str(row.digest()) for row in rows).encode())
    return {**entry, "sha256": digest.hexdigest()}

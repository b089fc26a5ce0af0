"""Read prompts to answer, each with its reference answer where the row has one.

In: what `--data` names (files, folders, globs, Hub ids or built-in data), or one file of prompts.
Out: `PromptExample` objects. From `--data` equal prompts come once, and the columns of a row decide
what its prompt is: `messages` up to the assistant's last turn, `prompt`, `instruction` with its
`input`, or `question`; a line of plain text is a prompt. Of one file every row is kept, in order.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from llmctl.console import log
from llmctl.data.documents import hash_text
from llmctl.data.rows import (
    OnBad,
    checked_text,
    open_source,
    parse_row,
    quote_names,
    read_lines,
    read_rows,
)
from llmctl.data.schemas import ROLES, Message, conversation, from_json
from llmctl.data.sources import Source, find_sources, manifest_input
from llmctl.data.split import hold_out
from llmctl.errors import DataError
from llmctl.numbers import counted

PROMPT_COLUMNS = ("prompt", "instruction", "question")
ANSWER_COLUMNS = ("answer", "response", "completion", "output", "chosen")
VAL_SIZE = 64
"""Prompts held out at most, where no number was given."""


@dataclass(frozen=True)
class PromptExample:
    """One prompt, and the reference answer where there is one."""

    prompt: str | list[Message]
    """Text, or the messages of a conversation that ends before the assistant's turn."""
    place: str
    """The file, the name of the source, or what else messages call it, such as `prompt 3`."""
    line: int | None = None
    answer: str | None = None

    @property
    def name(self) -> str:
        """Place and line for messages."""
        return self.place if self.line is None else f"{self.place}:{self.line}"

    @property
    def text(self) -> str:
        """The prompt as text: of a conversation, its last message."""
        return self.prompt if isinstance(self.prompt, str) else str(self.prompt[-1]["content"])

    @property
    def is_single(self) -> bool:
        """Whether it is one text, and not a conversation."""
        return isinstance(self.prompt, str) or len(self.prompt) == 1

    def digest(self) -> int:
        """Hash the prompt alone."""
        if isinstance(self.prompt, str):
            return hash_text(self.prompt.encode())
        turns = [(message["role"], str(message["content"])) for message in self.prompt]
        return hash_text(repr(turns).encode())


def read_prompt_file(file: Path) -> list[PromptExample]:
    """Read the prompts of a file: jsonl with `prompt` or `messages`, or one per line of any other.

    Raises:
        DataError: unreadable, not UTF-8, empty, or a row without a prompt.
    """
    prompts = [
        parse_prompt(parse_row(line, str(file), number), file, number)
        if file.suffix in (".jsonl", ".json")
        else PromptExample(line, str(file), number)
        for number, line in read_nonblank_lines(file)
    ]
    if not prompts:
        raise DataError("no prompts in this file", file=file)
    return prompts


def parse_prompt(row: dict[str, Any], file: Path, number: int) -> PromptExample:
    """Read the prompt of a row of jsonl; raise a DataError where it has none."""
    prompt: Any = row.get("messages", row.get("prompt"))
    if isinstance(prompt, list):
        _check_messages(prompt, file, number)
    elif not isinstance(prompt, str):
        raise DataError("a row needs `prompt` (text) or `messages`", file=file, line=number)
    return PromptExample(prompt, str(file), number)


def read_nonblank_lines(file: Path) -> Iterator[tuple[int, str]]:
    """Yield 1-based number and text, without its end, of each line that is not blank.

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
class PromptSet:
    """Prompts to train on and prompts that are held out."""

    train: list[PromptExample]
    val: list[PromptExample]
    inputs: list[dict[str, Any]]
    """For the manifest."""


def read_prompts(
    data: Sequence[str], val_data: Sequence[str], val_size: int | None, skip_bad_rows: int = 0
) -> PromptSet:
    """Read every prompt, and hold some out.

    Those of `val_data` are held out, else `val_size` of `data`: by default a tenth, at most 64.
    `skip_bad_rows` rows may be left out for their errors.

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
        prompts, inputs = _read_sources(data, Path(spool), tolerate, "data")
        val, val_inputs = _read_sources(val_data, Path(spool), tolerate, "validation")
    if bad:
        first = str(bad[0]).splitlines()[0]
        rows = counted(len(bad), "row")
        log.warning("left out %s without a prompt, the first: %s", rows, first)
    if val:
        held_out = {prompt.digest() for prompt in val}
        train = [prompt for prompt in prompts if prompt.digest() not in held_out]
        return PromptSet(train, val, inputs + val_inputs)
    kept, held = hold_out(
        prompts,
        size=val_size,
        fraction=None,
        key=PromptExample.digest,
        most=VAL_SIZE,
        noun="prompts",
    )
    return PromptSet([prompts[i] for i in kept], [prompts[i] for i in held], inputs)


def _read_sources(
    names: Sequence[str], spool: Path, on_bad: OnBad, role: str
) -> tuple[list[PromptExample], list[dict[str, Any]]]:
    """Read each prompt once, and record the sources for the manifest."""
    prompts: dict[int, PromptExample] = {}
    inputs = []
    repeated = 0
    for source in find_sources(names, spool):
        count = len(prompts) + repeated
        for prompt in _read_source(source, on_bad):
            repeated += prompt.digest() in prompts
            prompts.setdefault(prompt.digest(), prompt)
        if len(prompts) + repeated == count:
            raise DataError("no prompt in it", file=source.name)
        inputs.append(
            manifest_input(
                role, source, lambda: sha256(" ".join(map(str, prompts)).encode()).hexdigest()
            )
        )
    if repeated:
        copies = counted(repeated, "copy", "copies")
        log.info("left out %s of prompts that stand more than once", copies)
    return list(prompts.values()), inputs


def _read_source(source: Source, on_bad: OnBad) -> Iterator[PromptExample]:
    if source.kind == "text":
        with open_source(source) as file:
            for number, line in read_lines(file, source.name):
                if line.strip():
                    yield PromptExample(line.rstrip("\r\n"), source.name, number)
        return
    for record in read_rows(source, on_bad=on_bad):
        try:
            prompt, answer = _parse_columns(record.values)
        except DataError as error:
            error.file, error.line = record.place, record.line
            on_bad(error)
        else:
            yield PromptExample(prompt, record.place, record.line, answer)


def _parse_columns(row: dict[str, Any]) -> tuple[str | list[Message], str | None]:
    """Find the prompt of a row, and its answer where there is one."""
    for name in ("messages", "conversations"):
        if name in row:
            return _split_answer(conversation(row[name], name), name)
    name = next((column for column in PROMPT_COLUMNS if column in row), "")
    if not name:
        raise DataError(
            f"no prompt in these columns: {quote_names(list(row))}",
            hint=f"it takes `messages`, {quote_names(PROMPT_COLUMNS)}",
        )
    answer = next((row[key] for key in ANSWER_COLUMNS if isinstance(row.get(key), str)), None)
    value = from_json(row[name])
    if isinstance(value, list):
        messages, last_turn = _split_answer(conversation(value, name), name)
        return messages, answer or last_turn
    text = checked_text(value, name)
    extra = row.get("input") if name == "instruction" else None
    if extra is not None and checked_text(extra, "input").strip():
        text = f"{text}\n\n{extra}"
    if not text.strip():
        what = "empty" if not text else "nothing but white space"
        raise DataError(f"`{name}` is {what}: there is nothing to answer")
    return text, answer


def _split_answer(messages: list[Message], name: str) -> tuple[list[Message], str | None]:
    """Part the assistant's last turn, where there is one, from the conversation before it."""
    answer = None
    if messages and messages[-1]["role"] == "assistant":
        *messages, last = messages
        answer = str(last["content"])
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise DataError(f"`{name}` holds no turn of the user to answer")
    return messages, answer

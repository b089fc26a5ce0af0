"""Read prompts to answer, each with its reference answer where the row has one.

In: what `--data` names (files, folders, globs, Hub ids or built-in data), or one file of prompts.
Out: `PromptExample` objects. From `--data` equal prompts come once; of one file every row is kept,
in order. A row is asked as it is trained: the columns that decide its prompt, its system message
and its tools are those of `schemas.py`, up to the assistant's last turn; a line of plain text is a
prompt.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from llmctl.console import log
from llmctl.data.bad_rows import BadRows
from llmctl.data.documents import hash_text
from llmctl.data.examples import prompt_messages, with_system
from llmctl.data.rows import SourceRow, open_source, read_lines, read_rows
from llmctl.data.schemas import (
    INSTRUCTION,
    MORE,
    MORE_OF_OPENAI,
    OPENAI_PAIR,
    Layout,
    Message,
    check_beginning,
    conversation,
    layout_of,
    messages_or_text,
    parse_tools,
)
from llmctl.data.sources import Source, find_sources, manifest_input
from llmctl.data.split import hold_out
from llmctl.errors import DataError
from llmctl.numbers import counted

TAKEN = (
    "it takes `messages`, `prompt`, `instruction` (with its `input`), `question` or "
    "`input.messages`"
)
LAYOUTS = (
    Layout({"messages": "messages"}, MORE),
    Layout({"messages": "conversations"}, MORE),
    Layout({"prompt": "prompt"}, MORE),
    Layout({"prompt": "instruction"}, {**MORE, **INSTRUCTION}),
    Layout({"prompt": "question"}, MORE),
    Layout({"prompt": "input.messages"}, MORE_OF_OPENAI),
)
ANSWER_COLUMNS = ("answer", "response", "completion", "output", "chosen", OPENAI_PAIR["chosen"])
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
    tools: list[Any] | None = None
    """JSON schemas of what the assistant may call."""

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
        """Whether it is one text, and not a conversation or with tools."""
        return isinstance(self.prompt, str) or (len(self.prompt) == 1 and not self.tools)

    @property
    def is_text(self) -> bool:
        """Whether it is plain text, which goes on as it is where no chat is wanted."""
        return isinstance(self.prompt, str)

    @property
    def messages(self) -> list[Message]:
        """The prompt as a conversation: of a text, one turn of the user."""
        if isinstance(self.prompt, str):
            return [{"role": "user", "content": self.prompt}]
        return list(self.prompt)

    def digest(self) -> int:
        """Hash the prompt alone."""
        if isinstance(self.prompt, str):
            return hash_text(self.prompt.encode())
        turns = [
            (message["role"], str(message["content"]), *filter(None, [message.get("tool_calls")]))
            for message in self.prompt
        ]
        return hash_text(repr([*turns, *(self.tools or ())]).encode())


def read_prompt_file(file: Path) -> list[PromptExample]:
    """Read the prompts of a file: rows, or lines of plain text.

    Raises:
        DataError: unreadable, not UTF-8, empty, or a row without a prompt.
    """
    return [prompt for prompt, _ in read_prompt_rows(file)]


def read_prompt_rows(
    file: Path, also: Sequence[str] = ()
) -> list[tuple[PromptExample, dict[str, Any]]]:
    """Read the prompts of a file, each with its row, which is empty for a line of plain text.

    Names the columns that nothing reads; `also` are those that the caller reads.

    Raises:
        DataError: unreadable, not UTF-8, empty, or a row without a prompt.
    """
    prompts: list[tuple[PromptExample, dict[str, Any]]] = []
    bad = BadRows()
    with tempfile.TemporaryDirectory(prefix="llmctl-") as spool:
        for source in find_sources([str(file)], Path(spool)):
            prompts += _read_source(source, bad, also)
    if not prompts:
        is_pipe = str(file) == "-"
        what = "nothing to read: no prompt came" if is_pipe else "no prompts in this file"
        raise DataError(what, file="stdin" if is_pipe else file)
    bad.report()
    return prompts


@dataclass(frozen=True)
class PromptSet:
    """Prompts to train on and prompts that are held out."""

    train: list[PromptExample]
    val: list[PromptExample]
    inputs: list[dict[str, Any]]
    """For the manifest."""


def read_prompts(
    data: Sequence[str], val_data: Sequence[str], val_size: int | None, bad: BadRows
) -> PromptSet:
    """Read every prompt, and hold some out.

    Those of `val_data` are held out, else `val_size` of `data`: by default a tenth, at most 64.
    `bad` counts the rows that are left out for their errors.

    Raises:
        DataError: rows without a prompt, with file and line; or none left on one side.
        NetworkError: a Hub data set that cannot be reached.
    """
    with tempfile.TemporaryDirectory(prefix="llmctl-") as spool:
        prompts, inputs = _read_sources(data, Path(spool), bad, "data")
        val, val_inputs = _read_sources(val_data, Path(spool), bad, "validation")
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
    names: Sequence[str], spool: Path, bad: BadRows, role: str
) -> tuple[list[PromptExample], list[dict[str, Any]]]:
    """Read each prompt once, and record the sources for the manifest."""
    prompts: dict[int, PromptExample] = {}
    inputs = []
    repeated = 0
    for source in find_sources(names, spool):
        count = len(prompts) + repeated
        for prompt, _ in _read_source(source, bad):
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


def _read_source(
    source: Source, bad: BadRows, also: Sequence[str] = ()
) -> Iterator[tuple[PromptExample, dict[str, Any]]]:
    """Yield each prompt and the row that it is of; the columns `also` are read elsewhere."""
    if source.kind == "text":
        with open_source(source) as file:
            for number, line in read_lines(file, source.name):
                if line.strip():
                    yield PromptExample(line.rstrip("\r\n"), source.name, number), {}
        return
    for record in read_rows(source, on_bad=bad):
        try:
            prompt = parse_prompt(record)
        except DataError as error:
            error.file, error.line = record.place, record.line
            bad(error)
        else:
            layout = layout_of(record.values, LAYOUTS, "no prompt", TAKEN)
            unread = layout.unread(layout.flat(record.values))
            bad.note_unread(unread.difference(ANSWER_COLUMNS, also))
            yield prompt, record.values


def parse_prompt(record: SourceRow) -> PromptExample:
    """Read the prompt of a row, and its answer where there is one.

    Raises:
        DataError: no prompt, or one that training would refuse.
    """
    layout = layout_of(record.values, LAYOUTS, "no prompt", TAKEN)
    row = layout.flat(record.values)
    columns = layout.columns(row)
    values = {role: row.get(column) for role, column in columns.items()}
    role = next(iter(layout.needed))
    value = messages_or_text(values[role], columns[role])
    if role == "messages":
        messages = conversation(value, columns[role])
    else:
        messages = prompt_messages(values, columns)
    check_beginning(messages, columns[role])
    messages, answer = _split_answer(with_system(messages, values, columns), columns[role])
    tools = parse_tools(values.get("tools"), columns["tools"])
    is_text = role == "prompt" and not isinstance(value, list) and len(messages) == 1 and not tools
    prompt = messages[0]["content"] if is_text else messages
    return PromptExample(prompt, record.place, record.line, _answer(row) or answer, tools)


def _answer(row: dict[str, Any]) -> str | None:
    """Find the reference answer that stands in a column of its own."""
    for key in ANSWER_COLUMNS:
        value = messages_or_text(row.get(key), key)
        if isinstance(value, str):
            return value
        if isinstance(value, list) and value:
            return str(conversation(value, key)[-1]["content"])
    return None


def _split_answer(messages: list[Message], name: str) -> tuple[list[Message], str | None]:
    """Part the assistant's last turn, where there is one, from the conversation before it."""
    answer = None
    if messages[-1]["role"] == "assistant":
        *messages, last = messages
        answer = str(last["content"])
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise DataError(f"`{name}` holds no turn of the user to answer")
    return messages, answer

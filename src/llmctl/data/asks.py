"""Prompts as people give them: a file's rows or lines in, texts and conversations out."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmctl.data.conversations import ROLES
from llmctl.data.lines import parse_row, read_lines
from llmctl.errors import DataError

Message = dict[str, str]


@dataclass(frozen=True)
class Ask:
    """One prompt as it was given."""

    prompt: str | list[Message]
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

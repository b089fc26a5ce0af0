"""Prompts with the responses to be ranked.

In: a file of prompts, some with their responses. Out: entries, and questions: the distinct texts of
an entry in an order of their own, and ranks translated back from it.
"""

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

from llmctl.config.commands.rank import MOST_RESPONSES
from llmctl.data.prompts import PromptExample, parse_prompt
from llmctl.data.rows import open_source, read_lines, read_rows
from llmctl.data.schemas import Message
from llmctl.data.sources import Source, file_source
from llmctl.errors import DataError


@dataclass(frozen=True)
class Entry:
    """A row of the data."""

    example: PromptExample
    responses: tuple[str, ...] | None
    """None where a model is still to write them."""


@dataclass(frozen=True)
class Question:
    """A prompt, and responses to it that a person ranks."""

    prompt: str | list[Message]
    responses: tuple[str, ...]

    @cached_property
    def key(self) -> str:
        """Hash of prompt and responses, which identifies the question across runs."""
        return hashlib.sha256(canonical_json([self.prompt, self.responses]).encode()).hexdigest()

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """The responses that a reader can tell apart, without the blank around them."""
        return tuple(dict.fromkeys(text.strip() for text in self.responses))

    def shown(self, seed: int, annotator: str) -> list[str]:
        """Return the texts in the order that this person sees; nobody's order is the model's."""
        order = list(self.texts)
        random.Random(f"{seed}\0{annotator}\0{self.key}").shuffle(order)
        return order

    def ranks(self, shown_ranks: Sequence[int], seed: int, annotator: str) -> list[int]:
        """Return the rank of each response, from those of the texts as they were shown."""
        ranked = dict(zip(self.shown(seed, annotator), shown_ranks, strict=True))
        return [ranked[text.strip()] for text in self.responses]


def is_ranking(ranks: object, count: int) -> TypeGuard[list[int]]:
    """Whether these rank so many texts: 1 is the best, ties share a rank, and no rank is left out.

    So `[1, 2, 2, 3]` are ranks, `[1, 2, 2, 4]` are not.
    """
    return (
        isinstance(ranks, list)
        and len(ranks) == count
        and all(type(rank) is int for rank in ranks)
        and set(ranks) == set(range(1, len(set(ranks)) + 1))
    )


def canonical_json(value: Any) -> str:
    """Return the JSON that equal values share."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def read_entries(file: Path) -> list[Entry]:
    """Read the prompts of a file, each once: of its rows, or of plain text one per line.

    Raises:
        DataError: unreadable, not UTF-8, empty, or a row without a prompt or with responses that
            cannot be ranked.
    """
    entries: dict[str, Entry] = {}
    for number, entry in _entries(file_source(file), file):
        text = canonical_json([entry.example.prompt, entry.responses])
        try:
            text.encode()
        except UnicodeEncodeError:
            raise DataError("half of a surrogate pair", file=file, line=number) from None
        entries.setdefault(text, entry)
    if not entries:
        raise DataError("no prompts in this file", file=file)
    return list(entries.values())


def _entries(source: Source, file: Path) -> Iterator[tuple[int, Entry]]:
    """Yield the entry of each row or line that is not blank, and the line."""
    if source.kind == "text":
        with open_source(source) as lines:
            for number, line in read_lines(lines, source.name):
                if line.strip():
                    prompt = line.rstrip("\r\n")
                    yield number, Entry(PromptExample(prompt, f"{file}:{number}"), None)
        return
    for record in read_rows(source):
        number, row = record.line or 1, record.values
        yield number, Entry(parse_prompt(row, file, number), _responses(row, file, number))


def _responses(row: dict[str, Any], file: Path, number: int) -> tuple[str, ...] | None:
    """Return the responses in a row, None where there are none."""
    if "responses" not in row:
        return None
    texts = row["responses"]
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise DataError("`responses` needs a list of texts", file=file, line=number)
    if len(texts) < 2:
        what = "one response" if texts else "no responses"
        raise DataError(f"{what}: nothing to rank", file=file, line=number, hint="give two or more")
    if len(texts) > MOST_RESPONSES:
        raise DataError(
            f"{len(texts)} responses; at most {MOST_RESPONSES} can be ranked",
            file=file,
            line=number,
            hint="split the row, or leave some out",
        )
    return tuple(texts)

"""Prompts with the responses to be ranked.

In: a file of prompts, some with their responses. Out: entries, and questions: the distinct texts of
an entry in an order of their own, and ranks translated back from it.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

from llmctl.config.commands.rank import MOST_RESPONSES
from llmctl.data.prompts import PromptExample, read_prompt_rows
from llmctl.data.rows import checked_text
from llmctl.data.schemas import Message, from_json
from llmctl.errors import DataError
from llmctl.files import json_line


@dataclass(frozen=True)
class Entry:
    """A row of the data."""

    example: PromptExample
    responses: tuple[str, ...] | None
    """None where a model is still to write them."""

    @property
    def prompt_key(self) -> str:
        """Canonical JSON of the prompt and what the assistant may call."""
        return prompt_key(self.example.prompt, self.example.tools)

    def question(self, responses: tuple[str, ...]) -> "Question":
        """Ask for a ranking of these responses."""
        return Question(self.example.prompt, responses, self.example.tools)


@dataclass(frozen=True)
class Question:
    """A prompt, and responses to it that a person ranks."""

    prompt: str | list[Message]
    responses: tuple[str, ...]
    tools: list[Any] | None = None
    """JSON schemas of what the assistant may call."""

    @cached_property
    def key(self) -> str:
        """Hash of prompt, responses and tools, which identifies the question across runs."""
        parts = [self.prompt, self.responses, *([self.tools] if self.tools else [])]
        return hashlib.sha256(canonical_json(parts).encode()).hexdigest()

    def row(self) -> dict[str, Any]:
        """Columns of the question, as training reads them."""
        tools = {"tools": self.tools} if self.tools else {}
        return {"prompt": self.prompt, **tools, "responses": list(self.responses)}

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
    return json_line(value, sort_keys=True)


def prompt_key(prompt: str | list[Message], tools: list[Any] | None) -> str:
    """Return the canonical JSON of a prompt, and of its tools where it has any."""
    return canonical_json([prompt, tools] if tools else prompt)


def read_entries(file: Path) -> list[Entry]:
    """Read the prompts of a file, each once: rows, or lines of plain text.

    Raises:
        DataError: unreadable, not UTF-8, empty, or a row without a prompt or with responses that
            cannot be ranked.
    """
    entries: dict[str, Entry] = {}
    for example, row in read_prompt_rows(file, also=["responses"]):
        try:
            entry = Entry(example, _responses(row))
        except DataError as error:
            error.file, error.line = example.place, example.line
            raise
        entries.setdefault(canonical_json([entry.prompt_key, entry.responses]), entry)
    return list(entries.values())


def _responses(row: dict[str, Any]) -> tuple[str, ...] | None:
    """Return the responses in a row, None where there are none."""
    if "responses" not in row:
        return None
    texts = from_json(row["responses"])
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise DataError("`responses` needs a list of texts")
    if len(texts) < 2:
        what = "one response" if texts else "no responses"
        raise DataError(f"{what}: nothing to rank", hint="give two or more")
    if len(texts) > MOST_RESPONSES:
        raise DataError(
            f"{len(texts)} responses; at most {MOST_RESPONSES} can be ranked",
            hint="split the row, or leave some out",
        )
    return tuple(checked_text(text, f"responses[{k}]") for k, text in enumerate(texts))

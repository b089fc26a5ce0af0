"""Say what helps where a chat template and a conversation do not go together.

In: the flags that a command has, and what went wrong. Out: hints that name no other flag.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from llmctl.errors import ModelError

TEMPLATE_FLAG, SKIP_FLAG = "--chat-template", "--skip-bad-rows"
BOTH_FLAGS = (TEMPLATE_FLAG, SKIP_FLAG)
"""Of the commands that train on rows."""


def no_template() -> ModelError:
    """Build the error for a conversation that there is no template for; the caller places it."""
    return ModelError(
        "a conversation, and this model has no chat template",
        hint="use rows of text without a system message or tools, or a model with a template",
    )


@dataclass(frozen=True)
class Remedies:
    """Say what helps where a template and a conversation do not go together."""

    flags: frozenset[str]
    """Of the command, as `ChatFormat` takes them."""

    @property
    def skip(self) -> str:
        """Leave a row out."""
        return "leave the row out" + (f" ({SKIP_FLAG})" if SKIP_FLAG in self.flags else "")

    @property
    def broken(self) -> str:
        """The template itself is at fault."""
        if TEMPLATE_FLAG in self.flags:
            return f"choose another template: {TEMPLATE_FLAG} FILE, or a name such as chatml"
        return "mend the template in the model's folder, or use another model"

    @property
    def one_of_several(self) -> str:
        """None of several templates is the default."""
        if TEMPLATE_FLAG in self.flags:
            return f"choose one: save it to a file, and pass {TEMPLATE_FLAG} FILE"
        return "choose one: save it as chat_template.jinja in (a copy of) the model's folder"

    @property
    def left_out(self) -> str:
        """The template drops a part of a message."""
        return f"take it out of the row, or {self._other('writes it')}"

    def no_place(self, kind: str) -> str:
        """The template never writes this kind of part; of llmctl's only some write a system's."""
        is_system = kind in ("system", "developer")
        first = "put it at the head of the user's turn" if is_system else "take them out"
        named = ", or chatml" if is_system and TEMPLATE_FLAG in self.flags else ""
        return f"{first}, or {self._other('writes them')}{named}"

    def refused_row(self, message: str, messages: Sequence[Mapping[str, Any]]) -> str:
        """The template refuses these messages with a message of its own."""
        roles = [message["role"] for message in messages]
        said = message.lower()
        if "system" in said and roles[0] in ("system", "developer"):
            return "take the system message out, or put it at the head of the first user's turn"
        other = self._other("takes them")
        if "alternat" in said or any(a == b for a, b in pairwise(roles)):
            return f"merge messages of the same role that follow each other, or {other}"
        return f"{self.skip}, or {other}"

    def _other(self, what: str) -> str:
        if TEMPLATE_FLAG in self.flags:
            return f"choose a template that {what}: {TEMPLATE_FLAG} FILE"
        return f"use a model whose template {what}"

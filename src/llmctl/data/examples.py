"""Read examples to fine-tune on from rows of any schema, and check every row.

In: the names of `--data`. Out: sets of examples, one for each name. A row's schema follows from its
columns (see `schemas.py`). Everything but plain text and labelled text becomes messages.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmctl.data.bad_rows import BadRows
from llmctl.data.rows import SourceRow, checked_text, json_type
from llmctl.data.schemas import (
    Layout,
    Message,
    Task,
    check_turns,
    choose_layouts,
    conversation,
    from_json,
    messages_or_text,
    parse_dialogue_prompt,
    parse_tools,
    text_message,
)
from llmctl.data.sets import ItemSet, read_sets
from llmctl.errors import DataError


@dataclass(frozen=True)
class Example:
    """A conversation, a text, or a text with its label."""

    messages: tuple[Message, ...] | None
    text: str | None
    label: str | None
    tools: list[Any] | None
    """JSON schemas of what the assistant may call."""
    place: str
    """The file, or the name of the source."""
    line: int | None

    @property
    def name(self) -> str:
        """Place and line for messages."""
        return self.place if self.line is None else f"{self.place}:{self.line}"


def read_examples(
    data: Sequence[str],
    *,
    columns: Sequence[str] = (),
    bad: BadRows | None = None,
    task: Task = "chat",
    role: str = "data",
) -> list[ItemSet[Example]]:
    """Read every example that `data` names, in order, each file once.

    Each name of `data` has `=WEIGHT` or none; `columns` gives roles, as `prompt=q,response=a`,
    where names do not tell. `bad` counts the rows that are left out for their errors; without
    it none may be.
    `role` is the name of these inputs in the manifest.

    Raises:
        DataError: rows that are no examples, with file and line, or none at all.
        NetworkError: a Hub data set that cannot be reached.
        UserError: weights or columns that make no sense.
    """
    layouts = choose_layouts(columns, task)
    return read_sets(data, layouts, _parse_example, bad=bad, role=role)


def _parse_example(record: SourceRow, layout: Layout) -> list[Example]:
    row, needed = record.values, layout.needed
    if "text" in needed:
        text = checked_text(row[needed["text"]], needed["text"])
        if not text.strip():
            raise DataError(f"`{needed['text']}` is empty or nothing but white space")
        label = _label(row[needed["label"]], needed["label"]) if "label" in needed else None
        return [Example(None, text, label, None, record.place, record.line)]
    columns = layout.columns(row)
    values = {role: row.get(column) for role, column in columns.items()}
    if "messages" in needed:
        messages = conversation(values["messages"], columns["messages"])
    else:
        messages = prompt_response(values, columns)
    return [checked_example(record, messages, values, columns)]


def checked_example(
    record: SourceRow,
    messages: list[Message],
    values: Mapping[str, Any],
    columns: Mapping[str, str],
) -> Example:
    """Check a conversation, and add the system message and the tools of its row.

    `values` and `columns` are the row's values and the names of their columns, by role.

    Raises:
        DataError: no turn of the user or the assistant, or two system messages.
    """
    check_turns(messages, columns.get("messages") or columns["prompt"])
    messages = with_system(messages, values, columns)
    tools = parse_tools(values.get("tools"), columns.get("tools", "tools"))
    return Example(tuple(messages), None, None, tools, record.place, record.line)


def with_system(
    messages: list[Message], values: Mapping[str, Any], columns: Mapping[str, str]
) -> list[Message]:
    """Put the system message of a row before its turns.

    Raises:
        DataError: the turns begin with one, too.
    """
    system = values.get("system")
    if system is None or not checked_text(system, columns["system"]).strip():
        return messages
    if messages[0]["role"] in ("system", "developer"):
        raise DataError(f"`{columns['system']}` beside a message of the system: which counts?")
    return [{"role": "system", "content": system}, *messages]


def prompt_response(values: Mapping[str, Any], columns: Mapping[str, str]) -> list[Message]:
    """Make a conversation of a prompt and its response, each a text or a list of messages.

    A response that is a whole conversation has the prompt in it.

    Raises:
        DataError: one of them is blank, or neither a text nor messages.
    """
    response, prompt = values["response"], prompt_messages(values, columns)
    messages = _messages("assistant", response, columns["response"])
    if not messages or messages[0]["role"] in ("assistant", "tool"):
        return [*prompt, *messages]
    texts = [message["content"].strip() for message in messages]
    if any(message["content"].strip() not in texts for message in prompt):
        names = f"`{columns['response']}` is a whole conversation, and `{columns['prompt']}`"
        raise DataError(f"{names} is not in it")
    return messages


def prompt_messages(values: Mapping[str, Any], columns: Mapping[str, str]) -> list[Message]:
    """Make the turns before a response: those of `history`, and the prompt with its `input`.

    Raises:
        DataError: the prompt is blank, or neither a text nor messages.
    """
    prompt = join_input(values, columns)
    dialogue = parse_dialogue_prompt(prompt, columns["prompt"]) if isinstance(prompt, str) else None
    return [
        *_history(values.get("history")),
        *(dialogue or _messages("user", prompt, columns["prompt"])),
    ]


def join_input(values: Mapping[str, Any], columns: Mapping[str, str]) -> Any:
    """Return the prompt of a row, messages as a list; after a text stands its `input`.

    Raises:
        DataError: an `input` that is no text, or that goes with no text.
    """
    prompt, extra = messages_or_text(values["prompt"], columns["prompt"]), values.get("input")
    if extra is None or not checked_text(extra, columns["input"]).strip():
        return prompt
    return f"{checked_text(prompt, columns['prompt'])}\n\n{extra}"


def _messages(role: str, value: Any, name: str) -> list[Message]:
    value = messages_or_text(value, name)
    return (
        conversation(value, name) if isinstance(value, list) else [text_message(role, value, name)]
    )


def _history(value: Any) -> list[Message]:
    """Read earlier turns, as pairs of prompt and response."""
    pairs = from_json(value) or []
    if not isinstance(pairs, list) or not all(isinstance(p, list) and len(p) == 2 for p in pairs):
        raise DataError(f"`history` is {json_type(pairs)}, expected a list of pairs")
    roles = ("user", "assistant")
    return [
        text_message(role, text, "history")
        for pair in pairs
        for role, text in zip(roles, pair, strict=True)
    ]


def _label(value: Any, name: str) -> str:
    """Read a label as text."""
    if isinstance(value, bool | int):
        return json.dumps(value)
    label = checked_text(value, name).strip()
    if not label:
        raise DataError(f"`{name}` is empty")
    return label

"""Recognise the schema of rows by their columns, and parse conversations in any common form.

In: a row, and the roles that `--columns` gives its columns. Out: a `Layout`; `LAYOUTS` lists them.

In: the value of a column, such as OpenAI's `messages` or ShareGPT's `conversations`. Out: messages,
each a dict of `role` and `content` and, where there are any, `name`, `tool_calls`, `tool_call_id`,
reasoning and `weight`. Errors name the message; the caller adds file and line.
"""

import json
import re
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, Literal, NamedTuple

from llmctl.data.rows import DECODER, checked_text, json_type, quote_names
from llmctl.errors import DataError, UserError

Task = Literal["chat", "classify", "preferences"]
Row = dict[str, Any]
COLUMN_ROLES: dict[Task, tuple[str, ...]] = {
    "chat": ("messages", "prompt", "response", "system", "text"),
    "classify": ("text", "label"),
    "preferences": ("prompt", "chosen", "rejected", "margin", "system", "responses", "ranks"),
}

MORE = {"system": "system", "tools": "tools"}
PAIR = {"chosen": "chosen", "rejected": "rejected"}
MORE_OF_PAIR = {**MORE, "margin": "margin"}

WAYS: dict[Task, tuple[tuple[str, ...], ...]] = {
    "chat": (("messages",), ("text",), ("prompt", "response")),
    "classify": (("text", "label"),),
    "preferences": (
        ("responses", "ranks", "prompt"),
        ("prompt", "chosen", "rejected"),
    ),
}
"""Sets of roles that `--columns` may give: the first of which it names a role, else the last."""

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
KEPT = ("name", "tool_call_id", "reasoning_content", "thinking")
"""Fields of text that chat templates may use beside the content."""


class Layout(NamedTuple):
    """Columns that make an example."""

    needed: dict[str, str]
    """Column of each role."""
    more: dict[str, str]
    """Column of each optional role."""

    def __str__(self) -> str:
        """Name it for messages."""
        return " + ".join(f"`{column}`" for column in self.needed.values())


PAIR_LAYOUTS = (
    Layout({"prompt": "prompt", **PAIR}, MORE_OF_PAIR),
    Layout(
        {"prompt": "instruction", **PAIR},
        {**MORE_OF_PAIR, "input": "input", "history": "history"},
    ),
    Layout({"prompt": "question", **PAIR}, MORE_OF_PAIR),
    Layout(PAIR, MORE_OF_PAIR),
)
LAYOUTS: dict[Task, tuple[Layout, ...]] = {  # a row is of the first that it has the columns of
    "chat": (
        Layout({"messages": "messages"}, MORE),
        Layout({"messages": "conversations"}, MORE),
        Layout({"prompt": "prompt", "response": "completion"}, MORE),
        Layout({"prompt": "prompt", "response": "response"}, MORE),
        Layout(
            {"prompt": "instruction", "response": "output"},
            {**MORE, "input": "input", "history": "history"},
        ),
        Layout({"prompt": "question", "response": "answer"}, MORE),
        Layout({"prompt": "prompt", "response": "chosen"}, MORE),
        Layout({"text": "text"}, {}),
    ),
    "classify": (Layout({"text": "text", "label": "label"}, {}),),
    "preferences": (
        *PAIR_LAYOUTS,
        Layout({"prompt": "prompt", "responses": "responses", "ranks": "ranks"}, MORE),
    ),
}


def choose_layouts(columns: Sequence[str], task: Task) -> tuple[Layout, ...]:
    """Return a task's layouts, or the one of `--columns`; raise a UserError if it is senseless."""
    roles = _roles(columns, task)
    if not roles:
        return LAYOUTS[task]
    *ways, last = WAYS[task]
    needed = next((names for names in ways if roles.keys() & set(names) - {"prompt"}), last)
    more = {} if "text" in needed else MORE_OF_PAIR if "rejected" in needed else MORE
    if extra := [role for role in roles if role not in needed and role not in more]:
        raise UserError(f"--columns: `{extra[0]}` does not go with `{needed[0]}`")
    layout = Layout({**{role: role for role in needed}, **roles}, more)
    if "rejected" not in needed or "prompt" in roles:
        return (layout,)
    without = {role: column for role, column in layout.needed.items() if role != "prompt"}
    return layout, Layout(without, more)


def match_layout(
    row: Row, layouts: tuple[Layout, ...], known: Layout | None, first: int | None
) -> Layout:
    """Return the layout of a row, which must be that of the rows before it.

    `known` is the layout of the rows before it, `first` the line of the first of them.

    Raises:
        DataError: it is none of them, or another than that of the rows before it.
    """
    layout = next((c for c in layouts if row.keys() >= set(c.needed.values())), None)
    if layout is not None and known is not None and layout is not known:
        raise DataError(f"this row is {layout}, but that of line {first} is {known}")
    if layout is not None:
        return layout
    there = quote_names(list(row))
    if known is None and len(layouts) > 1:
        raise DataError(
            f"no example in these columns: {there}",
            hint=f"it takes {', '.join(map(str, layouts[:-1]))} or {layouts[-1]}; "
            f"else {_how(layouts[0])}",
        )
    needed = (known or layouts[0]).needed
    missing = next(column for column in needed.values() if column not in row)
    raise DataError(f"no column `{missing}`; there is {there}", hint=_how(layouts[0]))


def _how(layout: Layout) -> str:
    """Build a hint for naming the columns of the task that a layout is of."""
    task = next(task for task, roles in COLUMN_ROLES.items() if set(roles) >= layout.needed.keys())
    return "name the columns: --columns " + ",".join(f"{role}=NAME" for role in WAYS[task][-1])


def _roles(columns: Sequence[str], task: Task) -> dict[str, str]:
    """Parse the column of each role that `--columns` gives."""
    known = COLUMN_ROLES[task]
    roles: dict[str, str] = {}
    for pair in (pair.strip() for text in columns for pair in text.split(",")):
        role, sign, column = pair.partition("=")
        if not (sign and column) or role in roles:
            what = "given twice" if role in roles else "expected ROLE=NAME"
            raise UserError(f"--columns {pair}: {what}", hint="such as prompt=q,response=a")
        if role not in known:
            where = "of preferences" if task == "preferences" else f"in --task {task}"
            raise UserError(
                f"--columns {pair}: no role `{role}` {where}",
                hint=f"roles are {', '.join(known)}",
            )
        roles[role] = column
    return roles


def conversation(value: Any, name: str) -> list[Message]:
    """Parse the messages of a column, which may also be JSON text; errors call it `name`.

    Raises:
        DataError: no list, or an item that is no message.
    """
    value = from_json(value)
    if not isinstance(value, list):
        raise DataError(f"`{name}` is {json_type(value)}, expected a list of messages")
    return [_message(item, f"{name}[{number}]") for number, item in enumerate(value)]


def check_turns(messages: list[Message], name: str) -> None:
    """Raise a DataError unless the user begins a conversation and the assistant answers."""
    if not messages:
        raise DataError(f"`{name}` is empty: no message in it")
    roles = [message["role"] for message in messages]
    first = next((role for role in roles if role not in ("system", "developer")), None)
    if first in ("assistant", "tool"):
        raise DataError(f"the conversation begins with the {first}, expected the user")
    if "assistant" not in roles:
        raise DataError("no message of the assistant: nothing to learn from")


def parse_hh_rlhf(text: str, name: str) -> list[Message] | None:
    """Parse the messages of a text in the form of hh-rlhf (Bai et al., 2022, arXiv:2204.05862).

    Its turns begin with `Human:` and `Assistant:` after an empty line; None for other texts. Raises
    a DataError for a turn that says nothing.
    """
    first, *parts = re.split(r"\n\n(Human|Assistant):", text)
    if first or not parts:
        return None
    roles = ["user" if who == "Human" else "assistant" for who in parts[::2]]
    return [
        text_message(role, part.strip(), name)
        for role, part in zip(roles, parts[1::2], strict=True)
    ]


def text_message(role: str, content: str, name: str) -> Message:
    """Make a message of text; raise a DataError where it is blank, or no text."""
    if not checked_text(content, name).strip():
        what = "empty" if not content else "nothing but white space"
        raise DataError(f"`{name}` is {what}: the {role} says nothing")
    return {"role": role, "content": content}


def parse_tools(value: Any, name: str) -> list[Any] | None:
    """Parse tools' JSON schemas, perhaps from text; raise a DataError for no list of objects."""
    value = None if value is None or value == "" else from_json(value)
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise DataError(f"`{name}` is {json_type(value)}, expected a list of objects")
    _check_json(value, name)
    return value or None


def from_json(value: Any) -> Any:
    """Parse JSON in a column of text; return any other value as it is."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return DECODER.decode(value.strip())
    except (ValueError, RecursionError):
        return value


def _message(item: Any, name: str) -> Message:
    if not isinstance(item, dict):
        raise DataError(f"`{name}` is {json_type(item)}, expected an object")
    if item.get("role") is not None or item.get("from") is None:
        role, key = item.get("role"), "content"
    else:
        role, key = item["from"], "value"
        role = SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise _bad_role(role, name)
    calls = _calls(item.get("tool_calls"), f"{name}.tool_calls")
    if calls and role != "assistant":
        raise DataError(f"`{name}.tool_calls`: the {role} cannot call tools")
    content = _content(item, key, name, may_miss=bool(calls))
    if role == "user" or (role == "assistant" and not calls):
        message = text_message(role, content, f"{name}.{key}")
    else:
        message = {"role": role, "content": content}
    if calls:
        message["tool_calls"] = calls
    for key in KEPT:
        if item.get(key):
            message[key] = checked_text(item[key], f"{name}.{key}")
    if item.get("weight") is not None:
        message["weight"] = _weight(item["weight"], role, f"{name}.weight")
    return message


def _bad_role(role: Any, name: str) -> DataError:
    hint = None
    if not isinstance(role, str):
        what = "missing" if role is None else json_type(role)
    else:
        what = f"`{role[:40]}`"
        close = get_close_matches(role.lower(), [*ROLES, *SHAREGPT_ROLES], n=1)
        hint = f"did you mean `{SHAREGPT_ROLES.get(close[0], close[0])}`?" if close else None
    return DataError(f"the role of `{name}` is {what}, expected {', '.join(ROLES)}", hint=hint)


def _content(item: dict[str, Any], key: str, name: str, *, may_miss: bool) -> str:
    """Return the text of a message, its parts joined."""
    content, name = item.get(key), f"{name}.{key}"
    if content is None and may_miss:
        return ""
    if key not in item:
        raise DataError(f"no `{name}`; there is {', '.join(f'`{key}`' for key in item)}")
    if not isinstance(content, list):
        return checked_text(content, name)
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else json_type(part)
        if kind != "text":
            raise DataError(f"`{name}` has a part of type `{kind}`: only `text` can be learned")
    return "".join(checked_text(part.get("text"), f"{name}.text") for part in content)


def _calls(value: Any, name: str) -> list[Any]:
    """Parse calls of tools, their arguments as objects: templates would quote text twice."""
    value = from_json(value) or []
    if not isinstance(value, list):
        raise DataError(f"`{name}` is {json_type(value)}, expected a list of calls")
    calls = []
    for call in value:
        function = (call.get("function") or call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"`{name}` has a call without the name of a function")
        arguments = from_json(function.get("arguments")) or {}
        if not isinstance(arguments, dict):
            what = f"expected an object: {str(arguments)[:40]!r}"
            raise DataError(f"`{name}` has arguments that are {json_type(arguments)}, {what}")
        called = {**function, "arguments": arguments}
        calls.append(called if function is call else {**call, "function": called})
    _check_json(calls, name)
    return calls


def _check_json(value: Any, name: str) -> None:
    """Refuse a value that a template could not render as JSON."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise DataError(f"`{name}` is not JSON: {error}") from None


def _weight(value: Any, role: str, name: str) -> int:
    """Parse whether a message is trained on, 0 or 1 (the fine-tuning format of OpenAI)."""
    if isinstance(value, bool) or value not in (0, 1):
        raise DataError(f"`{name}` is {value!r}, expected 0 or 1")
    if role != "assistant":
        raise DataError(f"`{name}`: only the assistant is trained on, this is the {role}")
    return int(value)

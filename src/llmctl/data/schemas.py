"""Recognise the schema of rows by their columns, and parse conversations in any common form.

In: a row, and the roles that `--columns` gives its columns. Out: a `Layout`; `LAYOUTS` lists them.

In: the value of a column, such as OpenAI's `messages` or ShareGPT's `conversations`. Out: messages,
each a dict of `role` and `content` and, where there are any, `name`, `tool_calls`, `tool_call_id`,
reasoning and `weight`. Errors name the message; the caller adds file and line.
"""

import ast
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from typing import Any, Literal

from llmctl.data.rows import (
    DECODER,
    checked_text,
    json_problem,
    json_type,
    quote_names,
    said_columns,
)
from llmctl.errors import DataError, UserError

Task = Literal["chat", "classify", "preferences"]
Row = dict[str, Any]
COLUMN_ROLES: dict[Task, tuple[str, ...]] = {
    "chat": ("messages", "prompt", "input", "response", "system", "tools", "text"),
    "classify": ("text", "label"),
    "preferences": (
        *("prompt", "input", "chosen", "rejected", "margin"),
        *("system", "tools", "responses", "ranks"),
    ),
}

MORE = {"system": ("system", "system_prompt"), "tools": ("tools", "functions")}
INSTRUCTION = {"input": ("input", "context"), "history": ("history",)}
"""Optional columns beside `instruction`: of Alpaca, Dolly and LLaMA-Factory."""
PAIR = {"chosen": "chosen", "rejected": "rejected"}
MORE_OF_PAIR = {**MORE, "margin": ("margin",)}
OPENAI_PAIR = {"chosen": "preferred_output", "rejected": "non_preferred_output"}
MORE_OF_OPENAI = {"tools": ("input.tools",)}
"""Optional columns beside `input.messages`, in OpenAI's format of preferences."""
MEDIA = ("images", "videos", "audios")
"""Columns and keys of what a model of texts cannot read."""

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
OTHER_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function": "tool",
}
"""Roles of ShareGPT, of LLaMA-Factory's calls, and of OpenAI's first calls."""
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys of what the assistant thinks before it answers; a chat template knows one of them."""
KEPT = ("name", "tool_call_id", *REASONING)
"""Fields of text that chat templates may use beside the content."""
JSON_BEGINNINGS = ("[", "{")
PYTHON_OBJECTS = re.compile(
    r"\s*(?:array\()?(\[\s*\{'.*\}\s*\]|\{'.*\})(?:,\s*dtype=object\))?\s*", re.DOTALL
)
"""Text that may show objects as Python or NumPy does."""
TRAINED = ("weight", "train", "loss", "trainable")
"""Keys that say whether a turn is trained on, of OpenAI, axolotl and ms-swift."""
READ = frozenset(
    {"role", "content", "from", "value", "tool_calls", "function_call", *KEPT, *TRAINED, *MEDIA}
)
"""Keys of a message that are read; a template never sees others."""


@dataclass(frozen=True)
class Layout:
    """Columns that make an example.

    A name with a dot, `input.messages`, is that of a key of the objects in a column.
    """

    needed: dict[str, str]
    """Column of each role."""
    more: Mapping[str, tuple[str, ...]]
    """Columns of each optional role, of which a row has one."""

    def __str__(self) -> str:
        """Name it for messages."""
        return " + ".join(f"`{column}`" for column in self.needed.values())

    def fits(self, row: Row) -> bool:
        """Whether a row has the columns that are needed."""
        return self.flat(row).keys() >= set(self.needed.values())

    def flat(self, row: Row) -> Row:
        """Return a row with the keys of its objects as columns, where this layout names them."""
        for name in self._nested - row.keys():
            head, _, _ = name.partition(".")
            value = from_json(row.get(head))
            if isinstance(value, dict):
                rest = {column: inner for column, inner in row.items() if column != head}
                row = {**{f"{head}.{key}": inner for key, inner in value.items()}, **rest}
        return row

    def columns(self, row: Row) -> dict[str, str]:
        """Return the column of each role in a row; the first one of a role that is in none.

        Raises:
            DataError: two columns of one role say something, or it holds what is no text.
        """
        columns = {}
        for role, names in self.more.items():
            full = [name for name in names if row.get(name)] if len(names) > 1 else names
            if len(full) > 1:
                raise DataError(f"{quote_names(full)} beside each other: which one counts?")
            columns[role] = full[0] if full else names[0]
        if "text" not in self.needed:
            require_no_media(row)
        return {**columns, **self.needed}

    @cached_property
    def _nested(self) -> frozenset[str]:
        """Columns that may be keys of objects."""
        return frozenset(name for name in self.needed.values() if "." in name)

    @cached_property
    def _known(self) -> frozenset[str]:
        """Columns that are read."""
        more = (name for names in self.more.values() for name in names)
        return frozenset((*self.needed.values(), *more))

    def unread(self, row: Row) -> set[str]:
        """Return the columns of a row that say something and that nothing reads."""
        unread = said_columns(row, self._known)
        if (column := self.needed.get("messages")) is not None:
            unread |= {f"{column}[].{key}" for key in unread_keys(row[column])}
        return unread


PAIR_LAYOUTS = (
    Layout({"prompt": "prompt", **PAIR}, MORE_OF_PAIR),
    Layout(
        {"prompt": "instruction", **PAIR},
        {**MORE_OF_PAIR, **INSTRUCTION},
    ),
    Layout({"prompt": "question", **PAIR}, MORE_OF_PAIR),
    Layout({"prompt": "conversations", **PAIR}, MORE_OF_PAIR),
    Layout({"prompt": "messages", **PAIR}, MORE_OF_PAIR),
    Layout(PAIR, MORE_OF_PAIR),
    Layout({"prompt": "input.messages", **OPENAI_PAIR}, MORE_OF_OPENAI),
)
LAYOUTS: dict[Task, tuple[Layout, ...]] = {  # a row is of the first that it has the columns of
    "chat": (
        Layout({"messages": "messages"}, MORE),
        Layout({"messages": "conversations"}, MORE),
        Layout({"prompt": "prompt", "response": "completion"}, MORE),
        Layout({"prompt": "prompt", "response": "response"}, MORE),
        Layout({"prompt": "instruction", "response": "output"}, {**MORE, **INSTRUCTION}),
        Layout({"prompt": "instruction", "response": "response"}, {**MORE, **INSTRUCTION}),
        Layout({"prompt": "question", "response": "answer"}, MORE),
        Layout({"prompt": "question", "response": "response"}, MORE),
        Layout({"prompt": "prompt", "response": "chosen"}, MORE),
        Layout({"prompt": "input.messages", "response": OPENAI_PAIR["chosen"]}, MORE_OF_OPENAI),
        Layout({"text": "text"}, {}),
    ),
    "classify": (Layout({"text": "text", "label": "label"}, {}),),
    "preferences": (
        *PAIR_LAYOUTS,
        Layout({"prompt": "prompt", "responses": "responses", "ranks": "ranks"}, MORE),
    ),
}


OTHER_TOOLS = {
    frozenset({"segments"}): "segments of axolotl, which no chat template cuts so: give turns as "
    "`messages`, each of the assistant's with `train` true or false",
    frozenset({"fields", "responses"}): "records of Argilla: name the fields, as in --columns "
    "prompt=fields.NAME,response=fields.NAME; what annotators said goes into columns of its own "
    "first, one answer for each record",
    frozenset({"data", "annotations"}): "tasks of Label Studio: export them as JSON-MIN or CSV, "
    "which have a column for each label, and name it: --columns text=NAME,label=NAME",
    frozenset({"message_tree_id", "prompt"}): "trees of OpenAssistant: write each conversation "
    "from the root to a leaf as `messages`",
    frozenset({"row_idx", "row"}): "rows of the Hub's viewer, which cuts long texts: pass the data "
    "set itself, as owner/name",
}
"""Columns of what other tools export and nothing reads as it is; what it is, and what to do."""


def hint_for(row: Row) -> str | None:
    """Return what to do with a row that another tool exported; None where none is known."""
    return next((hint for names, hint in OTHER_TOOLS.items() if names <= row.keys()), None)


def choose_layouts(columns: Sequence[str], task: Task) -> tuple[Layout, ...]:
    """Return a task's layouts, or the one of `--columns`; raise a UserError if it is senseless."""
    roles = _roles(columns, task)
    if not roles:
        return LAYOUTS[task]
    *ways, last = WAYS[task]
    needed = next((names for names in ways if roles.keys() & set(names) - {"prompt"}), last)
    more = {} if "text" in needed else MORE_OF_PAIR if "rejected" in needed else MORE
    if roles.get("prompt") == "instruction":
        more = {**more, "input": ("input",), "history": ("history",)}
    optional = {*more, *({"input"} if "prompt" in needed else ())}
    if extra := [role for role in roles if role not in needed and role not in optional]:
        raise UserError(f"--columns: `{extra[0]}` does not go with `{needed[0]}`")
    more = {role: names for role, names in more.items() if role not in roles}
    layout = Layout({**{role: role for role in needed}, **roles}, more)
    if "rejected" not in needed or "prompt" in roles:
        return (layout,)
    without = {role: column for role, column in layout.needed.items() if role != "prompt"}
    return layout, Layout(without, more)


def layout_of(row: Row, layouts: Sequence[Layout], lacks: str, takes: str) -> Layout:
    """Return the first layout that a row has the columns of.

    Raises:
        DataError: it is of none: what it `lacks`, and what a row `takes`.
    """
    for layout in layouts:
        if layout.fits(row):
            return layout
    raise DataError(
        f"{lacks} in these columns: {quote_names(list(row))}", hint=hint_for(row) or takes
    )


def match_layout(
    row: Row, layouts: tuple[Layout, ...], known: Layout | None, first: int | None
) -> Layout:
    """Return the layout of a row, which must be that of the rows before it.

    `known` is the layout of the rows before it, `first` the line of the first of them.

    Raises:
        DataError: it is none of them, or another than that of the rows before it.
    """
    layout = next((c for c in layouts if c.fits(row)), None)
    if layout is not None and known is not None and layout is not known:
        raise DataError(f"this row is {layout}, but that of line {first} is {known}")
    if layout is not None:
        return layout
    there = quote_names(list(row))
    if known is None and len(layouts) > 1:
        raise DataError(
            f"no example in these columns: {there}",
            hint=hint_for(row)
            or f"it takes {', '.join(map(str, layouts[:-1]))} or {layouts[-1]}; "
            f"else {_how(layouts[0])}",
        )
    needed = (known or layouts[0]).needed
    flat = (known or layouts[0]).flat(row)
    missing = next(column for column in needed.values() if column not in flat)
    raise DataError(
        f"no column `{missing}`; there is {there}", hint=hint_for(row) or _how(layouts[0])
    )


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
        raise _no_list(value, name, "messages")
    return [_message(item, f"{name}[{number}]") for number, item in enumerate(value)]


def check_turns(messages: list[Message], name: str) -> None:
    """Raise a DataError unless the user begins a conversation and the assistant answers."""
    check_beginning(messages, name)
    if all(message["role"] != "assistant" for message in messages):
        raise DataError("no message of the assistant: nothing to learn from")


def check_beginning(messages: list[Message], name: str) -> None:
    """Raise a DataError unless the user begins a conversation, after the system at most."""
    if not messages:
        raise DataError(f"`{name}` is empty: no message in it")
    roles = (message["role"] for message in messages)
    first = next((role for role in roles if role not in ("system", "developer")), None)
    if first in ("assistant", "tool"):
        raise DataError(f"the conversation begins with the {first}, expected the user")


def parse_hh_rlhf(text: str, name: str) -> list[Message] | None:
    """Parse the messages of a text in the form of hh-rlhf (Bai et al., 2022, arXiv:2204.05862).

    Its turns begin with `Human:` and `Assistant:` after an empty line, which the first turn may
    have lost; None for other texts. Raises a DataError for a turn that says nothing.
    """
    first, *parts = re.split(r"(?:^\s*|\n\n)(Human|Assistant):", text)
    roles = ["user" if who == "Human" else "assistant" for who in parts[::2]]
    if first or not parts or not (text.startswith("\n\n") or "assistant" in roles):
        return None
    return [
        text_message(role, part.strip(), name)
        for role, part in zip(roles, parts[1::2], strict=True)
    ]


def messages_or_text(value: Any, name: str) -> Any:
    """Return messages, or a single one, as a list, also those that text spells in JSON.

    All else comes back as it is. Structured output is text: all objects of a list of messages have
    a role, and one at least has a known one, and says something.

    Raises:
        DataError: the column `name` has text that shows messages as Python does.
    """
    items = from_json(value)
    items = [items] if isinstance(items, dict) else items
    if not _are_messages(items):
        if _are_messages(_shown_by_python(value)):
            raise _python_error(name)
        return value
    return items


def _are_messages(items: Any) -> bool:
    """Whether a value is a list of messages; one whose roles are misspelled is, too."""
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        return False
    roles = [item.get("from") if item.get("role") is None else item["role"] for item in items]
    says = [
        item.keys() & ({"value"} if item.get("role") is None else {"content", "tool_calls"})
        for item in items
    ]
    return None not in roles and any(
        said and isinstance(role, str) and _nearest_role(role) is not None
        for role, said in zip(roles, says, strict=True)
    )


def require_no_media(item: Row, name: str = "") -> None:
    """Raise a DataError for a row or a message that comes with images, videos or sounds."""
    for key in MEDIA:
        if item.get(key):
            raise DataError(f"`{name}{key}` cannot be read: only text can be learned")


def parse_dialogue_prompt(text: str, name: str) -> list[Message] | None:
    """Parse a prompt that is a whole dialogue in the form of hh-rlhf, up to `Assistant:`.

    So the mirrors of hh-rlhf have it that part prompts from responses; None for other texts.
    """
    match = re.fullmatch(r"(\s*Human:.*)\n\nAssistant:\s*", text, re.DOTALL)
    return parse_hh_rlhf(f"\n\n{match[1].lstrip()}", name) if match else None


def text_message(role: str, content: str, name: str) -> Message:
    """Make a message of text; raise a DataError where it is blank, or no text."""
    if not checked_text(content, name).strip():
        what = "empty" if not content else "nothing but white space"
        raise DataError(f"`{name}` is {what}: the {role} says nothing")
    return {"role": role, "content": content}


def parse_tools(value: Any, name: str) -> list[Any] | None:
    """Parse tools' JSON schemas, perhaps from text; raise a DataError for no list of objects.

    OpenAI's `functions` get the frame of its `tools`.
    """
    value = None if value is None or value == "" else from_json(value)
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise _no_list(value, name, "objects")
    _check_json(value, name)
    if name == "functions":
        value = [{"type": "function", "function": tool} for tool in value]
    return value or None


def _no_list(value: Any, name: str, items: str) -> DataError:
    """Build the error for a column without a list; of text that looks like one it says why."""
    if _shown_by_python(value) is not None:
        return _python_error(name)
    is_meant = isinstance(value, str) and value.lstrip()[:1] in JSON_BEGINNINGS
    why = f" ({json_problem(value.strip())})" if is_meant else ""
    return DataError(f"`{name}` is {json_type(value)}{why}, expected a list of {items}")


def _python_error(name: str) -> DataError:
    """Build the error for objects that were written with `str`, as pandas writes them to csv."""
    return DataError(
        f"`{name}` is text that shows objects as Python does, which is no JSON",
        hint="write the rows as jsonl or parquet, or the column with json.dumps, not str",
    )


def _shown_by_python(value: Any) -> list[Row] | None:
    """Parse objects that text shows as Python or NumPy does; None for all else."""
    match = PYTHON_OBJECTS.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return None
    try:
        with warnings.catch_warnings(action="ignore"):
            items = ast.literal_eval(re.sub(r"\}\s+\{", "}, {", match[1]))
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None
    items = [items] if isinstance(items, dict) else items
    return items if all(isinstance(item, dict) for item in items) else None


def from_json(value: Any) -> Any:
    """Parse JSON in a column of text; return any other value as it is."""
    if not isinstance(value, str) or value.lstrip()[:1] not in JSON_BEGINNINGS:
        return value
    try:
        return DECODER.decode(value.strip())
    except (ValueError, RecursionError):
        return value


def unread_keys(value: Any) -> set[str]:
    """Return the keys of a column's messages that say something and that nothing reads."""
    items = from_json(value)
    return {
        key
        for item in (items if isinstance(items, list) else ())
        if isinstance(item, dict)
        for key in said_columns(item, READ)
    }


def _message(item: Any, name: str) -> Message:
    if not isinstance(item, dict):
        raise DataError(f"`{name}` is {json_type(item)}, expected an object")
    key = "content" if item.get("role") is not None or item.get("from") is None else "value"
    given = item.get("role" if key == "content" else "from")
    role = OTHER_ROLES.get(given, given) if isinstance(given, str) else given
    if role not in ROLES:
        raise _bad_role(role, name)
    require_no_media(item, f"{name}.")
    calls = _calls_of(item, key, name, is_call=given == "function_call")
    if calls and role != "assistant":
        raise DataError(f"`{name}.tool_calls`: the {role} cannot call tools")
    content = "" if given == "function_call" else _content(item, key, name, may_miss=bool(calls))
    if role == "user" or (role == "assistant" and not calls):
        message = text_message(role, content, f"{name}.{key}")
    else:
        message = {"role": role, "content": content}
    if calls:
        message["tool_calls"] = calls
    for key in KEPT:
        if item.get(key):
            message[key] = checked_text(item[key], f"{name}.{key}")
    if (weight := _weight(item, role, name)) is not None:
        message["weight"] = weight
    return message


def _calls_of(item: Row, key: str, name: str, *, is_call: bool) -> list[Any]:
    """Parse the calls of a message: its `tool_calls`, its `function_call`, or all of it."""
    if is_call:
        call = from_json(item.get(key))
        return _calls(call if isinstance(call, list) else [call], f"{name}.{key}")
    if item.get("function_call"):
        if item.get("tool_calls"):
            raise DataError(f"`{name}` has `tool_calls` and `function_call`: which one counts?")
        return _calls([from_json(item["function_call"])], f"{name}.function_call")
    return _calls(item.get("tool_calls"), f"{name}.tool_calls")


def _bad_role(role: Any, name: str) -> DataError:
    hint = None
    if not isinstance(role, str):
        what = "missing" if role is None else json_type(role)
    else:
        what, close = f"`{role[:40]}`", _nearest_role(role)
        hint = f"did you mean `{close}`?" if close else None
    return DataError(f"the role of `{name}` is {what}, expected {', '.join(ROLES)}", hint=hint)


def _nearest_role(role: str) -> str | None:
    """Return the role that a name may stand for."""
    close = get_close_matches(role.lower(), [*ROLES, *OTHER_ROLES], n=1)
    return OTHER_ROLES.get(close[0], close[0]) if close else None


def _content(item: dict[str, Any], key: str, name: str, *, may_miss: bool) -> str:
    """Return the text of a message, its parts joined."""
    content, name = item.get(key), f"{name}.{key}"
    if content is None and may_miss:
        return ""
    if key not in item:
        raise DataError(f"no `{name}`; there is {', '.join(f'`{key}`' for key in item)}")
    if not isinstance(content, list):
        return checked_text(content, name)
    return "".join(_part(part, name) for part in content)


def _part(part: Any, name: str) -> str:
    """Return the text of a part of a message's content."""
    if isinstance(part, str):
        return checked_text(part, name)
    kind = part.get("type") if isinstance(part, dict) else json_type(part)
    if not isinstance(part, dict) or kind != "text":
        raise DataError(f"`{name}` has a part of type `{kind}`: only `text` can be learned")
    return checked_text(part.get("text"), f"{name}.text")


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


def _weight(item: Row, role: str, name: str) -> int | None:
    """Parse whether a message is trained on, 0 or 1; None where it does not say."""
    weights = {key: item[key] for key in TRAINED if item.get(key) is not None}
    for key, value in weights.items():
        is_sound = value in (0, 1) and isinstance(value, bool) == (key != "weight")
        if not is_sound:
            wanted = "0 or 1" if key == "weight" else "true or false"
            raise DataError(f"`{name}.{key}` is {value!r:.40}, expected {wanted}")
    if len(set(map(int, weights.values()))) > 1:
        raise DataError(f"`{name}` has {quote_names(list(weights))}, which contradict each other")
    for key, value in weights.items():
        if role != "assistant" and (value or key == "weight"):
            text = f"`{name}.{key}`: only the assistant is trained on, this is the {role}"
            raise DataError(text)
        if role == "assistant":
            return int(value)
    return None

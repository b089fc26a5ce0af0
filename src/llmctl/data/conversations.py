"""Conversations as people keep them, checked and brought into one form.

In: the value of a column, such as OpenAI's `messages` or ShareGPT's `conversations`. Out: messages,
each a dict of `role` and `content` and, where there are any, `name`, `tool_calls`, `tool_call_id`,
reasoning and `weight`. Errors say what was found in which message; the caller knows file and line.
"""

import json
import re
from difflib import get_close_matches
from typing import Any

from llmctl.data.lines import DECODER, json_type
from llmctl.data.records import checked_text
from llmctl.errors import DataError

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
KEPT = ("name", "tool_call_id", "reasoning_content", "thinking")
"""Text that chat templates may use beside the content."""


def conversation(value: Any, name: str) -> list[Message]:
    """The messages of a column, which may also be JSON text; errors call it `name`.

    Raises:
        DataError: no list, or a message that is none.
    """
    value = from_json(value)
    if not isinstance(value, list):
        raise DataError(f"`{name}` is {json_type(value)}, expected a list of messages")
    return [_message(item, f"{name}[{number}]") for number, item in enumerate(value)]


def check_turns(messages: list[Message], name: str) -> None:
    """See that someone asks first and that the assistant answers.

    Raises:
        DataError: there is nothing to learn from, or it begins in the middle.
    """
    if not messages:
        raise DataError(f"`{name}` is empty: no message in it")
    roles = [message["role"] for message in messages]
    first = next((role for role in roles if role not in ("system", "developer")), None)
    if first in ("assistant", "tool"):
        raise DataError(f"the conversation begins with the {first}, expected the user")
    if "assistant" not in roles:
        raise DataError("no message of the assistant: nothing to learn from")


def dialogue(text: str, name: str) -> list[Message] | None:
    """The messages of a text in the form of hh-rlhf (Bai et al., 2022, arXiv:2204.05862).

    Its turns begin with `Human:` and `Assistant:` after an empty line; None for other texts.

    Raises:
        DataError: a turn that says nothing.
    """
    first, *parts = re.split(r"\n\n(Human|Assistant):", text)
    if first or not parts:
        return None
    roles = ["user" if who == "Human" else "assistant" for who in parts[::2]]
    return [said(role, part.strip(), name) for role, part in zip(roles, parts[1::2], strict=True)]


def said(role: str, content: str, name: str) -> Message:
    """A message of text.

    Raises:
        DataError: the text is blank, or no text.
    """
    if not checked_text(content, name).strip():
        what = "empty" if not content else "nothing but white space"
        raise DataError(f"`{name}` is {what}: the {role} says nothing")
    return {"role": role, "content": content}


def tools_of(value: Any, name: str) -> list[Any] | None:
    """JSON schemas of what the assistant may call, which may also be JSON text.

    Raises:
        DataError: no list of objects.
    """
    value = None if value is None or value == "" else from_json(value)
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise DataError(f"`{name}` is {json_type(value)}, expected a list of objects")
    _check_json(value, name)
    return value or None


def from_json(value: Any) -> Any:
    """What a text spells in JSON, for files whose columns hold only text; else the value itself."""
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
        message = said(role, content, f"{name}.{key}")
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
    """The text of a message, its parts joined."""
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
    """Calls of tools, their arguments as objects: as text, templates would quote them twice."""
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
    """Refuse what a template could not write down."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise DataError(f"`{name}` is not JSON: {error}") from None


def _weight(value: Any, role: str, name: str) -> int:
    """Whether a message is trained on, 0 or 1 (the fine-tuning format of OpenAI)."""
    if isinstance(value, bool) or value not in (0, 1):
        raise DataError(f"`{name}` is {value!r}, expected 0 or 1")
    if role != "assistant":
        raise DataError(f"`{name}`: only the assistant is trained on, this is the {role}")
    return int(value)

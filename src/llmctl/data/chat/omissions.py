"""Find what a chat template leaves out of the messages that it is given.

In: rendered text, and the messages that it is of. Out: the first part of them that is not in it.
Templates drop what they have no place for without a word: a system message, reasoning, the text
beside a call.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from llmctl.data.schemas import REASONING

MARK = "Zqxjkv"
"""A word that no template writes by itself."""
CALLED = "vkjxqz_tool"
"""Name of a tool that is called, and not among the tools, which templates list."""
CALL_ID = "zqxjkv123"
"""Nine letters and digits, which Mistral's templates ask for."""
PROBE_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "zqxjkv_tool",
            "description": "A tool.",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "string", "description": "A text."}},
                "required": ["a"],
            },
        },
    }
]
_USER = {"role": "user", "content": "Hi"}
_ANSWER = {"role": "assistant", "content": "Hello."}
_CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {
            "id": CALL_ID,
            "type": "function",
            "function": {"name": CALLED, "arguments": {"a": "b"}},
        }
    ],
}
_RESULT = {"role": "tool", "name": CALLED, "tool_call_id": CALL_ID, "content": MARK}

PROBES: dict[str, tuple[Mapping[str, Any], ...]] = {
    "system": ({"role": "system", "content": MARK}, _USER, _ANSWER),
    "developer": ({"role": "developer", "content": MARK}, _USER, _ANSWER),
    "tool_calls": (_USER, _CALL),
    "tool": (_USER, _CALL, _RESULT, _ANSWER),
    **{key: (_USER, {**_ANSWER, key: MARK}) for key in REASONING},
}
"""A conversation with one part of each kind, which a template writes or not."""

NAMES = {
    "system": "messages of the system",
    "developer": "messages of the developer",
    "tools": "tools",
    "tool": "what tools answer",
    "tool_calls": "calls of tools",
}

_THOUGHT = re.compile(r".*</think>", re.DOTALL)


def with_text_arguments(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Copy messages with the arguments of their calls as JSON text."""
    copies = []
    for message in messages:
        calls = []
        for call in message.get("tool_calls", ()):
            function = call.get("function") or call
            text = json.dumps(function["arguments"], ensure_ascii=False)
            written = {**function, "arguments": text}
            calls.append({**call, "function": written} if "function" in call else written)
        copies.append({**message, **({"tool_calls": calls} if calls else {})})
    return copies


def kinds_of(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """List the kinds of parts that a conversation has, each once."""
    kinds: dict[str, None] = {}
    for message in messages:
        if message["role"] in PROBES and message["content"].strip():
            kinds[message["role"]] = None
        kinds |= {key: None for key in ("tool_calls", *REASONING) if message.get(key)}
    return list(kinds)


def writes(text: str, kind: str) -> bool:
    """Whether the rendered probe of a kind has its part in it."""
    return (CALLED if kind == "tool_calls" else MARK) in text


def missing_part(text: str, messages: Sequence[Mapping[str, Any]]) -> str | None:
    """Name a part of the messages that the text does not have; None where it has all.

    It has a part as often as all parts and calls together have its words: where they stand
    elsewhere, too, the part is not there for that. White space and the escapes of JSON make no
    difference. Reasoning before the user's last turn may be missing, also where it stands in the
    content, before `</think>`.
    """
    is_plain = all(message.keys().isdisjoint(("tool_calls", *REASONING)) for message in messages)
    if is_plain and _stand_in_order(text, [message["content"] for message in messages]):
        return None  # as nearly all rows
    parts = [part for part in _parts(messages) if part.text.strip()]
    calls = [
        (number, call.get("function") or call)
        for number, message in enumerate(messages, start=1)
        for call in message.get("tool_calls", ())
    ]
    texts = [part.text for part in parts]
    if any(part.is_beside_call for part in parts) or not (
        _stand_in_order(text, texts) or _stand_in_order(_squeezed(text), map(_squeezed, texts))
    ):
        called = [
            leaf for _, call in calls for leaf in leaves([call["name"], call.get("arguments")])
        ]
        missing = _missing_of(_squeezed(text), parts, list(map(_squeezed, called)))
        if missing is not None:
            return missing.name
    for number, call in calls:
        if call["name"] not in text:
            return f"the call of {call['name']} in message {number}"
    return None


def leaves(value: Any) -> Iterator[str]:
    """Yield the texts of JSON, names of keys included; numbers as they are written."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield key
            yield from leaves(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from leaves(inner)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield json.dumps(value)


class _Part(NamedTuple):
    """Text of a message that a template is to write."""

    name: str
    text: str
    is_beside_call: bool


def _parts(messages: Sequence[Mapping[str, Any]]) -> Iterator[_Part]:
    """Yield what is to be written, in order."""
    users = [number for number, message in enumerate(messages) if message["role"] == "user"]
    last = users[-1] if users else -1
    for number, message in enumerate(messages):
        role, content, is_earlier = message["role"], message["content"], number < last
        has_calls = bool(message.get("tool_calls"))
        if not is_earlier and not message.keys().isdisjoint(REASONING):
            thoughts = {message.get(key): key for key in reversed(REASONING)}  # one under two names
            for thought, key in thoughts.items():
                yield _Part(f"`{key}` of message {number + 1}", thought or "", has_calls)
        if is_earlier and role == "assistant" and "</think>" in content:
            content = _THOUGHT.sub("", content)
        yield _Part(f"the content of message {number + 1}, of the {role}", content, has_calls)


def _stand_in_order(text: str, parts: Iterable[str]) -> bool:
    """Whether each part stands as it is after the one before: then none has another's place."""
    at = 0
    for part in parts:
        found = text.find(part, at)
        if found < 0:
            return False
        at = found + len(part)
    return True


def _missing_of(text: str, parts: Sequence[_Part], called: Sequence[str]) -> _Part | None:
    """Find the part that a text without white space has too seldom.

    Of several it is the longest, since the words in it are then too rare as well; of equal ones
    that beside a call. `called` are the texts of calls.
    """
    forms = [_forms(part.text) for part in parts]
    said = [own for own, *_ in forms] + list(called)
    missing, rank = None, (0, False)
    for part, own in zip(parts, forms, strict=True):
        own_rank = (len(own[0]), part.is_beside_call)
        wanted = sum(other.count(own[0]) for other in said)
        if own_rank > rank and sum(map(text.count, set(own))) < wanted:
            missing, rank = part, own_rank
    return missing


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _forms(part: str) -> tuple[str, ...]:
    """A part without white space, as it is and as JSON writes it."""
    part = part.strip()
    escaped = (json.dumps(part, ensure_ascii=is_ascii)[1:-1] for is_ascii in (False, True))
    return tuple(map(_squeezed, (part, *escaped)))

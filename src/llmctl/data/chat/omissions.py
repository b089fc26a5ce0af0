"""Find what a chat template leaves out of the messages that it is given.

In: rendered text, and the messages that it is of. Out: the first part of them that is not in it.
Templates drop what they have no place for without a word: a system message, reasoning, the text
beside a call.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from llmctl.data.schemas import REASONING

MARK = "Zqxjkv"
"""A word that no template writes by itself."""
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
            "function": {"name": "zqxjkv_tool", "arguments": {"a": "b"}},
        }
    ],
}
_RESULT = {"role": "tool", "name": "zqxjkv_tool", "tool_call_id": CALL_ID, "content": MARK}

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
    return ("zqxjkv_tool" if kind == "tool_calls" else MARK) in text


def missing_part(text: str, messages: Sequence[Mapping[str, Any]]) -> str | None:
    """Name the first part of the messages that the text does not have; None where it has all.

    White space and the escapes of JSON make no difference. Reasoning before the user's last turn
    may be missing, also where it stands in the content, before `</think>`.
    """
    rendered = _Rendered(text)
    users = [number for number, message in enumerate(messages) if message["role"] == "user"]
    last = users[-1] if users else -1
    for number, message in enumerate(messages):
        content, is_earlier = message["content"], number < last
        if is_earlier and message["role"] == "assistant" and "</think>" in content:
            content = _THOUGHT.sub("", content)
        if not rendered.has(content):
            return f"the content of message {number + 1}, of the {message['role']}"
        for key in () if is_earlier else REASONING:
            if not rendered.has(message.get(key, "")):
                return f"`{key}` of message {number + 1}"
        for call in message.get("tool_calls", ()):
            name = (call.get("function") or call)["name"]
            if name not in text:
                return f"the call of {name} in message {number + 1}"
    return None


class _Rendered:
    """Rendered text to look parts up in."""

    def __init__(self, text: str) -> None:
        self._text = text

    @cached_property
    def _squeezed(self) -> str:
        return "".join(self._text.split())

    def has(self, part: str) -> bool:
        """Whether a part stands in the text, but for white space and the escapes of JSON."""
        if part in self._text:
            return True
        part = part.strip()
        forms = (
            part,
            *(json.dumps(part, ensure_ascii=is_ascii)[1:-1] for is_ascii in (False, True)),
        )
        return any("".join(form.split()) in self._squeezed for form in forms)

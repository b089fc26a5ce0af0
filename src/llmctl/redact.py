"""Keep secrets out of everything that llmctl writes: files, log lines, error messages.

A secret is the value of an environment variable that is named like one, a Hugging Face token, or
the user and password of a URL.
"""

import json
import os
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

REDACTED = "[redacted]"
SHORTEST = 8
"""Values of fewer characters are no secrets worth hiding, and stand in too many other words."""

_NAMED_SECRET = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIAL)S?$", re.IGNORECASE)
_HUB_TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")
_USER_OF_URL = re.compile(r"([A-Za-z][\w+.-]+:/{1,2})[^/\s?#\"'<>]+@")
"""Also with a single slash, which is what a path makes of a URL."""


def redact(text: str) -> str:
    """Replace every secret in a text by `[redacted]`."""
    values = frozenset(
        value.strip()
        for name, value in os.environ.items()
        if len(value.strip()) >= SHORTEST and _NAMED_SECRET.search(name)
    )
    if values:
        text = _pattern(values).sub(REDACTED, text)
    return _USER_OF_URL.sub(rf"\1{REDACTED}@", _HUB_TOKEN.sub(REDACTED, text))


def redacted(value: Any) -> Any:
    """Redact every text in a value, however deep in mappings and lists.

    Before it is serialized: an escaped secret would not be found any more.
    """
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {key: redacted(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(item) for item in value]
    return value


@lru_cache(maxsize=4)
def _pattern(values: frozenset[str]) -> re.Pattern[str]:
    """Return a pattern of the values, the longest first, plain or escaped by `repr` or JSON."""
    forms = {f for v in values for f in (v, repr(v)[1:-1], json.dumps(v)[1:-1])}
    return re.compile("|".join(re.escape(f) for f in sorted(forms, key=len, reverse=True)))

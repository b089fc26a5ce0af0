"""What a check found."""

from dataclasses import dataclass
from typing import Literal

from llmctl.errors import ResourceError, UserError


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's."""

    name: str
    state: Literal["ok", "warning", "failure"]
    text: str
    fix: str | None = None
    """What to do about it, in words or as a command."""

    error: type[UserError] = ResourceError
    """What a failure is to a script: its exit code."""

"""Check the machine, the packages and the network: each check gives a `CheckResult`."""

from dataclasses import dataclass
from typing import Literal

from llmctl.errors import ResourceError, UserError


@dataclass(frozen=True)
class CheckResult:
    """One line of `llmctl doctor`."""

    name: str
    state: Literal["ok", "warning", "failure"]
    text: str
    fix: str | None = None
    """In words, or as a command."""

    error: type[UserError] = ResourceError
    """Kind of a failure, which gives the exit code."""

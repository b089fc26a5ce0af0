"""Errors that users meet, each class with its exit code.

A message says what is wrong with the offending value, then where, then what to type instead.
`require_extra` refuses a command whose optional library is missing.
"""

from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar


class UserError(Exception):
    """Something the user can mend: a wrong flag or recipe (exit code 2) or a subclass's cause."""

    code: ClassVar[int] = 2

    def __init__(
        self,
        message: str,
        *,
        file: Path | str | None = None,
        line: int | None = None,
        hint: str | None = None,
    ) -> None:
        """Keep the parts apart, so that `--json` can report them as fields.

        Args:
            message: what is wrong, with the offending value.
            file: the file it was found in.
            line: 1-based line in that file.
            hint: what to type or do instead.
        """
        super().__init__(message)
        self.message = message
        self.file = None if file is None else str(file)
        self.line = line
        self.hint = hint
        self.is_reported = False
        """Whether another rank prints it already."""
        self.is_shared = False
        """Whether all processes of the run raise it."""
        self.report: dict[str, Any] = {}
        """Partial result that `--json` prints beside the error."""

    def __str__(self) -> str:
        """Format place and message, then the hint, on one to three lines."""
        place = "" if self.file is None else self.file + (f":{self.line}" if self.line else "")
        text = f"{place}: {self.message}" if place else self.message
        return f"{text}\n{self.hint}" if self.hint else text

    def as_json(self) -> dict[str, Any]:
        """Return the `error` object that `--json` prints."""
        return {
            "code": self.code,
            "type": type(self).__name__,
            "message": self.message,
            "file": self.file,
            "line": self.line,
            "hint": self.hint,
        }


class DataError(UserError):
    """Data that cannot be read or would train a wrong model."""

    code = 3


class OutputError(UserError):
    """An output directory that must not or cannot be written."""

    code = 3


class ModelError(UserError):
    """A model, tokenizer or checkpoint that is invalid or not trusted."""

    code = 4


class ResourceError(UserError):
    """Too little memory or disk, or another process of the run is lost."""

    code = 5


class NetworkError(UserError):
    """The Hub cannot be reached, or the machine is offline."""

    code = 6


class DivergedError(UserError):
    """NaN or infinity in the loss or the gradients."""

    code = 7


class GateError(UserError):
    """A quality gate that the user set did not hold."""

    code = 8


class Interrupted(UserError):
    """SIGINT: the run was saved and can be resumed."""

    code = 130


class Terminated(UserError):
    """SIGTERM or SIGUSR1: the run was saved and can be resumed."""

    code = 143


class ProcessError(UserError):
    """An llmctl process that ended by a bug, and printed its own traceback."""

    code = 1


def from_json(error: Mapping[str, Any], code: int) -> UserError:
    """Rebuild the error of an llmctl process from its exit code and what it printed with `--json`.

    That is an `error` object, empty where it printed none.
    """
    kinds = [kind for kind in _subclasses(UserError) if kind.code == code]
    named = next((kind for kind in kinds if kind.__name__ == error.get("type")), None)
    kind = named or next(iter(kinds), ProcessError)
    message = error.get("message") or f"the process ended with exit code {code}"
    return kind(message, file=error.get("file"), line=error.get("line"), hint=error.get("hint"))


def _subclasses(kind: type[UserError]) -> Iterator[type[UserError]]:
    yield kind
    for inner in kind.__subclasses__():
        yield from _subclasses(inner)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of a message that names the nearest known name, empty where none is near."""
    from difflib import get_close_matches

    close = get_close_matches(name, list(known), n=1)
    return f": did you mean `{close[0]}`?" if close else ""


def require_extra(package: str, extra: str, purpose: str) -> None:
    """Refuse to go on without an optional package, which an extra of llmctl brings.

    Raises:
        ResourceError: with the extra to install.
    """
    if find_spec(package) is None:
        name = package.replace("_", "-")
        raise ResourceError(
            f"{purpose} needs {name}, which is not installed",
            hint=f'run: pip install "llmctl[{extra}]"',
        )

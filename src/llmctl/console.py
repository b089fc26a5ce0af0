"""Write to stderr: log lines and progress, on a terminal and in a pipe; print recipes."""

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from threading import Timer
from typing import TYPE_CHECKING, Any, Protocol, Self

from llmctl.numbers import duration
from llmctl.redact import redact

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress


log = logging.getLogger("llmctl")

NOISY = ("torchao", "torch.utils._pytree")
"""Loggers that complain when torchao is imported, which transformers does for every model."""

PLAIN_SECONDS = 5.0
"""Seconds between two lines of progress where there is no terminal."""

SLOW_SECONDS = 1.0
"""Seconds of silence after which a terminal is told what takes so long."""

CONTROL_CHARACTERS = dict.fromkeys(
    {*range(32), *range(127, 160)} - {ord("\n"), ord("\t")}, "\N{REPLACEMENT CHARACTER}"
)
"""Translation of control characters to one that is seen and does nothing."""

ProgressListener = Callable[[str, int, int, str], None]
"""Gets the title of the task, units done, units in total, and its latest metrics."""

_listener: ContextVar[ProgressListener | None] = ContextVar("listener", default=None)


class _Stderr(logging.Handler):
    """Write to whatever stderr is now, so that lines stand above a live progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        print(prefix + redact(record.getMessage()), file=sys.stderr)


def set_up(*, quiet: bool = False, verbose: bool = False) -> None:
    """Send log lines to stderr: errors only when quiet, details too when verbose."""
    log.handlers = [_Stderr()]
    log.propagate = False
    log.setLevel(logging.ERROR if quiet else logging.DEBUG if verbose else logging.INFO)
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)


@cache
def say_once(message: str, *, is_warning: bool = False) -> None:
    """Log a message the first time that it comes: data is read several times."""
    log.log(logging.WARNING if is_warning else logging.INFO, message)


def rank() -> int:
    """This process's rank, as launchers set it; only rank 0 speaks and writes."""
    number = os.environ.get("RANK", "")
    return int(number) if number.isdecimal() else 0


def is_terminal() -> bool:
    """Whether stderr can show a live progress bar."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


@contextmanager
def said_if_slow(text: str) -> Iterator[None]:
    """Say what the body does once it has taken a second, on a terminal."""
    timer = Timer(SLOW_SECONDS, log.info, (text,))
    timer.daemon = True
    if is_terminal():
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def progress_to(listener: ProgressListener) -> Iterator[None]:
    """Report progress to the listener instead of showing it, in the body."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


class ProgressBar:
    """A bar with time left on a terminal; a plain line every few seconds elsewhere."""

    def __init__(self, title: str, total: int, unit: str = "step") -> None:
        """Count from 0 to total, in steps or in bytes (`unit="B"`)."""
        self.title, self.total, self.unit = title, max(total, 1), unit
        self.started = self._printed = time.monotonic()
        self.first = 0
        self._rich: RichProgress | None = None

    def __enter__(self) -> Self:
        """Show the bar, where there is a terminal and logging is on."""
        if listener := _listener.get():
            listener(self.title, 0, self.total, "")
        elif log.isEnabledFor(logging.INFO) and is_terminal():
            self._rich = _rich_progress(self.unit)
            self._task = self._rich.add_task(self.title, total=self.total, text="")
            self._rich.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the last state on the screen."""
        if self._rich is not None:
            self._rich.stop()

    def start_at(self, done: int) -> None:
        """Continue a resumed run: time left is estimated from here on."""
        self.first = done
        self.update(done)

    def update(self, done: int, text: str = "") -> None:
        """Report the units done, and the latest metrics as text."""
        if listener := _listener.get():
            listener(self.title, done, self.total, text)
            return
        if self._rich is not None:
            self._rich.update(self._task, completed=done, text=text)
            return
        now = time.monotonic()
        if now - self._printed >= PLAIN_SECONDS and done < self.total:
            self._printed = now
            log.info(self._line(done, text, now - self.started))

    def _line(self, done: int, text: str, elapsed: float) -> str:
        share = done / self.total
        gained = done - self.first
        left = f"eta {duration(elapsed * (self.total - done) / gained)}" if gained > 0 else ""
        where = f"{share:.0%}" if self.unit == "B" else f"{self.unit} {done:,}/{self.total:,}"
        return "  ".join(part for part in (self.title, where, text, left) if part)


def _rich_progress(unit: str) -> "RichProgress":
    from rich import progress
    from rich.console import Console

    counted = progress.DownloadColumn() if unit == "B" else progress.MofNCompleteColumn()
    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(bar_width=30),
        counted,
        progress.TextColumn("{task.fields[text]}"),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
        refresh_per_second=4,
    )


class HasRecipe(Protocol):
    """A config that can show itself as a recipe."""

    @property
    def as_json(self) -> bool:
        """Whether the result is to be an object."""

    def recipe(self, stage: str) -> dict[str, Any]:
        """Return the recipe's keys and values."""

    def to_yaml(self, stage: str) -> str:
        """Return the recipe as YAML."""


def show_recipe(stage: str, config: HasRecipe, plan: Any = None) -> dict[str, Any] | None:
    """Print a command's recipe as YAML; with `--json` return it and the plan, which is JSON."""
    if config.as_json:
        return {"recipe": config.recipe(stage), "plan": plan}
    if rank() == 0:
        print(config.to_yaml(stage), end="")
    return None

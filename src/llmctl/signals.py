"""Handle SIGINT, SIGTERM and SIGUSR1, outside and inside of a training loop.

While there is nothing to undo (start-up, imports) a signal ends the process at once. While a
command runs the first one raises `Stopped`, so that the run directory is put in order. A training
loop reads a `StopFlag` between steps instead: it finishes the step, saves and ends; a second signal
ends the process at once.
"""

import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from llmctl.errors import Interrupted, Terminated, UserError

CAUGHT = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
ECHO = 5.0
"""Seconds in which a launched rank may get the first signal again, from its launcher."""


_raised: list[int] = []
"""Number of the signal that `Stopped` was raised for, while `raising_on_signals` is in force."""


class Stopped(KeyboardInterrupt):
    """A signal arrived; as a KeyboardInterrupt it passes every library's `except Exception`."""

    def __init__(self, number: int) -> None:
        """Keep the signal's number."""
        super().__init__()
        self.number = number


def exit_on_signals() -> None:
    """End the process at once on any signal from now on, with one line and its exit code."""
    for number in _handled_signals():
        signal.signal(number, exit_now)


@contextmanager
def raising_on_signals() -> Iterator[None]:
    """Raise the error of the first signal while the body runs; a second one ends the process.

    A library may turn the exception of a signal into one of its own: that is undone here.
    """
    began = math.inf

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal began
        now = time.monotonic()
        if not _raised:
            began = now
            _raised.append(number)
            raise Stopped(number)
        if "RANK" not in os.environ or now - began > ECHO:
            exit_now(number, frame)

    try:
        with handled_by(handle):
            yield
    except BaseException as error:
        if (signalled := signal_error(error)) and signalled is not error:
            raise signalled from None
        raise
    finally:
        _raised.clear()


def exit_now(number: int, frame: FrameType | None) -> None:
    """Print the error and end the process, which no library can turn into something else."""
    error = _error(number)
    if os.environ.get("RANK", "0") == "0":
        if "--json" in sys.argv:
            os.write(1, json.dumps({"error": error.as_json()}).encode() + b"\n")
        os.write(2, f"error: {error}\n".encode())
    os._exit(error.code)


def signal_error(error: BaseException) -> UserError | None:
    """Return the error of the signal behind an exception, which a library may have wrapped.

    The first error after a signal is its: native code names no cause (safetensors does not).
    """
    if isinstance(error, Interrupted | Terminated):
        return error
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, UserError):
        if isinstance(cause, KeyboardInterrupt):
            return _error(cause.number if isinstance(cause, Stopped) else signal.SIGINT)
        cause = cause.__cause__ or cause.__context__
    return _error(_raised[0]) if _raised else None


@contextmanager
def handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Give the handler the signals that are not ignored, while the body runs."""
    before = {number: signal.getsignal(number) for number in _handled_signals()}
    try:
        for number in before:
            signal.signal(number, handler)
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def _handled_signals() -> list[int]:
    """Return the signals to handle: a background shell's SIGINT is ignored, and stays so."""
    return [n for n in CAUGHT if signal.getsignal(n) not in (signal.SIG_IGN, None)]


def _error(number: int) -> Interrupted | Terminated:
    if number == signal.SIGINT:
        return Interrupted("interrupted")
    return Terminated("terminated")


class StopFlag:
    """Set by the first signal; the loop reads it between steps."""

    def __init__(self, echo: float = 0.0) -> None:
        """Nothing has arrived yet; what comes within `echo` seconds of the first is the first."""
        self.received: int = 0
        self._echo, self._at = echo, 0.0

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Note the first signal; leave at the second."""
        now = time.monotonic()
        if not self.received:
            self.received, self._at = number, now
        elif now - self._at >= self._echo:
            os._exit(128 + (number if number == signal.SIGINT else signal.SIGTERM))

    @staticmethod
    def error(number: int, step: int) -> Interrupted | Terminated:
        """Return the error to raise once the step is saved."""
        error = _error(number)
        text = f"{error.message} after step {step:,}: saved"
        return type(error)(text, hint="continue with --resume")


@contextmanager
def stop_flag() -> Iterator[StopFlag]:
    """Catch the signals in a flag while the body runs."""
    flag = StopFlag(ECHO if "RANK" in os.environ else 0.0)
    with handled_by(flag.handle):
        yield flag

"""SIGINT, SIGTERM and SIGUSR1: finish the step, save, end; a second signal ends at once."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from llmctl.errors import Interrupted, Terminated
from llmctl.stopping import ECHO, handled_by


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
        """What to raise once the step is saved."""
        kind = Interrupted if number == signal.SIGINT else Terminated
        word = "interrupted" if kind is Interrupted else "terminated"
        return kind(f"{word} after step {step:,}: saved", hint="continue with --resume")


@contextmanager
def stop_flag() -> Iterator[StopFlag]:
    """A flag that catches the signals while the body runs."""
    flag = StopFlag(ECHO if "RANK" in os.environ else 0.0)
    with handled_by(flag.handle):
        yield flag

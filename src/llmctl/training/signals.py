"""SIGINT, SIGTERM and SIGUSR1: finish the step, save, end; a second signal ends at once."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from llmctl.console import log
from llmctl.errors import Interrupted, Terminated

CAUGHT = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopFlag:
    """Set by the first signal; the loop reads it between steps."""

    def __init__(self) -> None:
        """Nothing has arrived yet."""
        self.received: int = 0

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Note the first signal; leave at the second."""
        if self.received:
            os._exit(128 + (number if number == signal.SIGINT else signal.SIGTERM))
        self.received = number

    @staticmethod
    def error(number: int, step: int) -> Interrupted | Terminated:
        """What to raise once the step is saved."""
        kind = Interrupted if number == signal.SIGINT else Terminated
        word = "interrupted" if kind is Interrupted else "terminated"
        return kind(f"{word} after step {step:,}: saved", hint="continue with --resume")


@contextmanager
def stop_flag() -> Iterator[StopFlag]:
    """A flag that catches the signals while the body runs."""
    flag = StopFlag()
    before = {number: signal.signal(number, flag.handle) for number in CAUGHT}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        log.debug("signal handlers restored")

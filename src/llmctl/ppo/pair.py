"""Two computations at once on a CPU: policy and value model know nothing of each other.

A product of small matrices is too short to be shared among cores; two networks are not. What is
computed, and so every bit of it, stays the same.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from llmctl.hardware import threads_set

One = TypeVar("One")
Other = TypeVar("Other")
LARGEST = 30_000_000
"""Parameters up to which this is done: beyond, cores share a product well, and the activations of
both networks at once take memory."""


class Pair:
    """Runs two functions, side by side where that pays."""

    def __init__(self, threads: int, parameters: int, device: str) -> None:
        """Decide by what the models are and where they run."""
        self.threads = max(1, threads // 2)
        self._pool: ThreadPoolExecutor | None = None
        if device == "cpu" and threads > 1 and parameters <= LARGEST:
            self._pool = ThreadPoolExecutor(
                1, initializer=torch.set_num_threads, initargs=(self.threads,)
            )

    def run(self, one: Callable[[], One], other: Callable[[], Other]) -> tuple[One, Other]:
        """What both give; with the threads of each where they run at once."""
        if self._pool is None:
            return one(), other()
        with threads_set(self.threads):
            waiting = self._pool.submit(other)
            try:
                first = one()
            finally:
                second = waiting.result()
        return first, second

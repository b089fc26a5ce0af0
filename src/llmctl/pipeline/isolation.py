"""One stage must not change the next: the process's state before the first is put back each time.

What a stage leaves behind and others would see: numbers of threads, random generators, the type of
new tensors, the environment, handlers and levels of loggers, filters of warnings.
"""

import gc
import logging
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


class Beginning:
    """The state of the process as it was when this was made."""

    def __init__(self) -> None:
        """Take note of everything."""
        self.environment = dict(os.environ)
        self.path = list(sys.path)
        self.generators: tuple[Any, ...] = (
            random.getstate(),
            np.random.get_state(),
            torch.get_rng_state(),
        )
        self.threads = torch.get_num_threads()
        self.settings = dict(_settings())
        self.loggers = {name: _looks(logger) for name, logger in _loggers()}

    @contextmanager
    def again(self) -> Iterator[None]:
        """Run the body as the first thing that this process does, and leave no trace of it."""
        self.restore()
        try:
            with warnings.catch_warnings():
                yield
        finally:
            self.restore()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def restore(self) -> None:
        """Put everything back."""
        if dict(os.environ) != self.environment:
            for name in set(os.environ) - set(self.environment):
                del os.environ[name]
            os.environ.update(self.environment)
        sys.path[:] = self.path
        random.setstate(self.generators[0])
        np.random.set_state(self.generators[1])
        torch.set_rng_state(self.generators[2])
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        for restore, value in self.settings.items():
            restore(value)
        for name, logger in _loggers():
            if name in self.loggers:
                logger.level, logger.handlers[:], logger.propagate = self.loggers[name]


def _settings() -> list[tuple[Callable[[Any], Any], Any]]:
    """Functions that set what is one for the process, each with what is set now."""
    return [
        (torch.set_default_dtype, torch.get_default_dtype()),
        (torch.set_float32_matmul_precision, torch.get_float32_matmul_precision()),
        (torch.set_grad_enabled, torch.is_grad_enabled()),
        (torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled()),
    ]


def _loggers() -> Iterator[tuple[str, logging.Logger]]:
    known = {"": logging.getLogger(), **logging.Logger.manager.loggerDict}
    return ((n, one) for n, one in list(known.items()) if isinstance(one, logging.Logger))


def _looks(logger: logging.Logger) -> tuple[int, list[logging.Handler], bool]:
    return logger.level, list(logger.handlers), logger.propagate

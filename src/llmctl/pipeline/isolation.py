"""Restore the process's state between stages, so that none changes the next.

Stages change numbers of threads, random generators, the type of new tensors, the environment,
handlers and levels of loggers, filters of warnings.
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


class ProcessState:
    """The state of the process as it was when the object was made."""

    def __init__(self) -> None:
        """Take the state."""
        self.environment = dict(os.environ)
        self.path = list(sys.path)
        self.generators: tuple[Any, ...] = (
            random.getstate(),
            np.random.get_state(),
            torch.get_rng_state(),
        )
        self.threads = torch.get_num_threads()
        self.settings = dict(_settings())
        self.loggers = {
            name: (logger.level, list(logger.handlers), logger.propagate)
            for name, logger in _loggers()
        }

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Run the body in this state, and restore it afterwards."""
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
        """Put the whole state back."""
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
    """Return functions that set process-wide values of torch, each with the value now."""
    return [
        (torch.set_default_dtype, torch.get_default_dtype()),
        (torch.set_float32_matmul_precision, torch.get_float32_matmul_precision()),
        (torch.set_grad_enabled, torch.is_grad_enabled()),
        (torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled()),
    ]


def _loggers() -> Iterator[tuple[str, logging.Logger]]:
    known = {"": logging.getLogger(), **logging.Logger.manager.loggerDict}
    return ((n, item) for n, item in list(known.items()) if isinstance(item, logging.Logger))

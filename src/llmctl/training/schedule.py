"""The learning rate of every step, by the same rule for every training command."""

import math
from typing import Protocol

from llmctl.config.sections import Optimizer


class Scheduled(Protocol):
    """What decides the learning rate: a plan has it."""

    @property
    def lr(self) -> float:
        """Peak."""

    @property
    def schedule(self) -> str:
        """cosine, linear, constant or wsd."""

    @property
    def max_steps(self) -> int:
        """Steps of the run."""

    @property
    def warmup_steps(self) -> int:
        """Steps up to the peak."""

    @property
    def decay_steps(self) -> int:
        """Steps at the end in which wsd decays."""

    @property
    def min_lr(self) -> float:
        """Rate at the end as a share of the peak."""


def lr_at(plan: Scheduled, step: int) -> float:
    """Learning rate of step number `step`, counted from 0."""
    if step < plan.warmup_steps:
        return plan.lr * (step + 1) / plan.warmup_steps
    if plan.schedule == "constant":
        return plan.lr
    start = plan.warmup_steps
    if plan.schedule == "wsd":
        start = max(start, plan.max_steps - plan.decay_steps)
    done = min(1.0, max(0.0, (step - start) / max(1, plan.max_steps - start)))
    shape = (1 + math.cos(math.pi * done)) / 2 if plan.schedule == "cosine" else 1 - done
    return plan.lr * (plan.min_lr + (1 - plan.min_lr) * shape)


def warmup_steps(config: Optimizer, max_steps: int) -> int:
    """The warm-up in steps, which may be given as a share."""
    return int(config.warmup if config.warmup >= 1 else round(config.warmup * max_steps))

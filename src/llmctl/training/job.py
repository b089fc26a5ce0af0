"""A training run in progress, whoever computes its steps: our loop, or one of TRL's trainers."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from accelerate import Accelerator

from llmctl.checkpoint import Content, Owner
from llmctl.rundir import Run


@dataclass
class Progressed:
    """How far a run is; all of it goes into a checkpoint's state.json."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    """Wall time over all resumptions."""
    training_seconds: float = 0.0
    """The same without evaluation and saving."""
    skipped_steps: int = 0
    best_step: int | None = None
    best_loss: float = math.inf
    evals_since_best: int = 0
    last_log: dict[str, Any] = field(default_factory=dict)
    last_eval: dict[str, float] = field(default_factory=dict)
    best_eval: dict[str, float] = field(default_factory=dict)

    def judge(self, found: dict[str, float]) -> bool:
        """Take in an evaluation; return whether it is the best so far."""
        self.last_eval = found
        improved = found["val_loss"] < self.best_loss
        if improved:
            self.best_step, self.best_loss, self.best_eval = self.step, found["val_loss"], found
        self.evals_since_best = 0 if improved else self.evals_since_best + 1
        return improved

    def forget_best(self) -> None:
        """Judge evaluations from here on only."""
        self.best_step, self.best_loss, self.evals_since_best = None, math.inf, 0
        self.best_eval = {}


@dataclass(frozen=True)
class Rhythm:
    """How long a run is and what happens every so many of its steps. None of it decides weights,
    but for `max_steps`.
    """

    max_steps: int
    log_every: int
    eval_every: int
    save_every: int
    keep: int
    early_stop: int | None
    on_nan: str
    max_nan_skips: int


@dataclass
class Job:
    """What the guarantees are given on: `guard.py` works on this."""

    title: str
    run: Run
    accelerator: Accelerator
    device: str
    identity: dict[str, Any]
    rhythm: Rhythm
    flops_per_token: float | None
    capture: Callable[[], Content]
    """All that decides how the run goes on; collective."""
    evaluate: Callable[[], dict[str, float]] | None
    """Measure `val_loss` and more, leaving no trace; collective. None without validation data."""
    lr: Callable[[], float]
    """Learning rate of the step just done."""
    sample: Callable[[int], None] = lambda step: None
    """Write down what the model says at a step, leaving no trace; called on every rank."""
    extras: Callable[[], dict[str, Any]] = dict
    """Further metrics since the last call."""
    progressed: Progressed = field(default_factory=Progressed)
    damaged: set[int] = field(default_factory=set)
    """Steps of checkpoints that resume passed over."""

    @property
    def world(self) -> int:
        """Number of processes."""
        return int(self.accelerator.num_processes)

    @property
    def rank(self) -> int:
        """This process."""
        return int(self.accelerator.process_index)

    @property
    def owner(self) -> Owner:
        """Whose checkpoints this run writes."""
        return Owner(self.run.manifest.get("run_id"), self.identity)

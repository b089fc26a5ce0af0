"""A training run in progress: how far it is, and how its state is captured."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from accelerate import Accelerator

from llmctl.config.commands.ppo import PpoConfig
from llmctl.config.commands.pretrain import PretrainConfig
from llmctl.config.finetuning import Tuning
from llmctl.runs.checkpoint import CheckpointContent, Owner
from llmctl.runs.directory import Run
from llmctl.training.hyperparameters import Hyperparameters


@dataclass
class Progress:
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

    def record_evaluation(self, metrics: dict[str, float]) -> bool:
        """Take in an evaluation; return whether it is the best so far."""
        self.last_eval = metrics
        improved = metrics["val_loss"] < self.best_loss
        if improved:
            self.best_step, self.best_loss, self.best_eval = self.step, metrics["val_loss"], metrics
        self.evals_since_best = 0 if improved else self.evals_since_best + 1
        return improved

    def forget_best(self) -> None:
        """Compare evaluations from here on only."""
        self.best_step, self.best_loss, self.evals_since_best = None, math.inf, 0
        self.best_eval = {}


@dataclass
class RunState:
    """A run in progress, as `fault_tolerance.py` and `meter.py` see it."""

    run: Run
    accelerator: Accelerator
    device: str
    config: PretrainConfig | Tuning | PpoConfig
    values: Hyperparameters
    identity: dict[str, Any]
    """Everything that decides the weights, by flag: a resumed run must have the same."""
    flops_per_token: float | None
    """Training FLOPs of the model; None where they are not known."""
    capture: Callable[[], CheckpointContent]
    """All that decides how the run goes on; collective."""
    evaluate: Callable[[], dict[str, float]] | None
    """Measure `val_loss` and more, leaving no trace; collective. None without validation data."""
    sample: Callable[[int], None] = lambda step: None
    """Write down what the model says at a step, leaving no trace; called on every rank."""
    metrics: Callable[[], dict[str, Any]] = dict
    """Further metrics since the last call; collective."""
    progress: Progress = field(default_factory=Progress)
    saved: int | None = None
    """Step of this run's newest checkpoint."""
    damaged: set[int] = field(default_factory=set)
    """Steps of checkpoints that resume passed over."""

    @property
    def lr(self) -> float:
        """Learning rate of the step just done."""
        return self.values.lr_at(self.progress.step - 1)

    @property
    def world(self) -> int:
        """Number of processes."""
        return int(self.accelerator.num_processes)

    @property
    def rank(self) -> int:
        """Number of this process."""
        return int(self.accelerator.process_index)

    @property
    def owner(self) -> Owner:
        """Whose checkpoints this run writes."""
        return Owner(self.run.manifest.get("run_id"), self.identity)

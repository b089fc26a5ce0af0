"""What a training loop works on, and how far it is."""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer

from llmctl.rundir import Run
from llmctl.training.batches import Batches
from llmctl.training.plan import Plan

if TYPE_CHECKING:
    from llmctl.data.shards import TokenSplit


@dataclass
class Progressed:
    """How far a run is; all of it goes into a checkpoint's state.json."""

    step: int = 0
    tokens: int = 0
    best_step: int | None = None
    best_loss: float = math.inf
    evals_since_best: int = 0
    last_eval: dict[str, float] = field(default_factory=dict)
    best_eval: dict[str, float] = field(default_factory=dict)

    def forget_best(self) -> None:
        """Judge evaluations from here on only."""
        self.best_step, self.best_loss, self.evals_since_best = None, math.inf, 0
        self.best_eval = {}


@dataclass
class Trainer:
    """Everything the loop works on."""

    model: nn.Module
    optimizers: list[Optimizer]
    plan: Plan
    train: Batches
    val: "TokenSplit | None"
    run: Run
    accelerator: Accelerator
    device: str
    flops_per_token: float
    identity: dict[str, Any]
    keep: int
    log_every: int
    progressed: Progressed = field(default_factory=Progressed)

    @property
    def world(self) -> int:
        """Number of processes."""
        return int(self.accelerator.num_processes)

    @property
    def rank(self) -> int:
        """This process."""
        return int(self.accelerator.process_index)

"""What our training loop works on."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn
from torch.optim import Optimizer

from llmctl.training.batches import Batches
from llmctl.training.job import Job
from llmctl.training.plan import Plan

if TYPE_CHECKING:
    from llmctl.data.shards import TokenSplit


@dataclass
class Trainer:
    """The model and its data, and the job that they are for."""

    model: nn.Module
    optimizers: list[Optimizer]
    plan: Plan
    train: Batches
    val: "TokenSplit | None"
    job: Job

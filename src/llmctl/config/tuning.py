"""What every command that trains a given model further has in common."""

from typing import Annotated, Literal, Self

from pydantic import NonNegativeFloat, PositiveInt, model_validator

from llmctl.config.base import Also
from llmctl.config.sections import (
    Batch,
    Compiled,
    Evaluation,
    Fraction,
    Length,
    OpenFraction,
    Optimizer,
    Placement,
    Resumable,
)
from llmctl.config.supervised import LowRank, Memory


class Tuning(LowRank, Length, Batch, Optimizer, Memory, Evaluation, Placement, Compiled, Resumable):
    """How to train it further."""

    group_by_length: bool = False
    """Put examples of like length into one step: less padding, less mixing."""

    optimizer: Annotated[
        Literal["auto", "adamw", "adamw-8bit", "paged-adamw-8bit"], Also("optim")
    ] = "auto"
    """Update rule. auto: AdamW; its paged 8-bit form for a quantized model on a GPU."""

    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay, on matrices only."""

    beta2: Annotated[OpenFraction, Also("adam-beta2")] = 0.999
    """AdamW's decay of the second moment."""

    min_lr: Annotated[Fraction, Also("min-lr-rate")] = 0.0
    """Learning rate at the end, as a share of the peak (wsd and linear and cosine)."""

    log_every: Annotated[PositiveInt | None, Also("logging-steps", "log-interval")] = None
    """Steps between lines of metrics; by default a hundredth of the run."""

    @model_validator(mode="after")
    def _check_tuning(self) -> Self:
        if self.max_steps and self.epochs:
            raise ValueError("give --max-steps or --epochs, not both")
        if "decay" in self.given() and self.schedule != "wsd":
            raise ValueError("--decay goes with --schedule wsd")
        if "min_lr" in self.given() and self.schedule == "constant":
            raise ValueError("--min-lr does not go with --schedule constant")
        return self

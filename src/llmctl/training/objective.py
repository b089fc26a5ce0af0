"""The contract of a training method with the loop: loss of a micro-batch, and validation.

A loss is a sum and the weight that it counts. The loop divides by the weight of the whole step over
all processes, so neither accumulation, processes, packing nor padding change a result.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor

from llmctl.training.batches import Batch, on_device
from llmctl.training.distributed import autocast
from llmctl.training.state import evaluating, generators_kept


class Loss(NamedTuple):
    """Loss of a micro-batch."""

    total: Tensor
    """Sum over what counts, with gradients."""
    weight: float
    """Trained tokens, texts, or pairs by their weights; known on the CPU."""
    sums: Tensor | None = None
    """(F + 1,) sums of the objective's figures, and of how many they are means."""
    mean: Tensor | None = None
    """A mean over the micro-batch to add, with gradients, such as a router's balancing loss. It has
    the weight of the micro-batch's share: a step split otherwise gives nearly the same."""


class Objective(Protocol):
    """A training method."""

    @property
    def figures(self) -> tuple[str, ...]:
        """Names of what `Loss.sums` sums up: metrics of a training step beside its loss."""

    def loss(self, model: Any, batch: Batch) -> Loss:
        """Loss of a micro-batch that is on the model's device; called under autocast."""

    def validate(self, model: Any) -> dict[str, float]:
        """`val_loss` and more over the validation data of all processes. Collective."""


@dataclass(frozen=True)
class Validation:
    """Validation batches of this process, and how sums over all of them are taken."""

    batches: Callable[[], Iterable[tuple[Batch, bool]]]
    """Each with whether it counts: every process has as many, as sharded models need."""
    accelerator: Accelerator
    device: str
    precision: str

    @torch.no_grad()
    def sums(self, model: Any, measure: Callable[[Any, Batch], Tensor]) -> Tensor:
        """Sum a tensor of sums over a batch, always of one shape, over all batches that count.

        In float64 on the CPU, over all processes. Collective.
        """
        where = "cpu" if self.device == "mps" else self.device  # which has no float64
        total: Tensor | None = None
        with evaluating(model), generators_kept():
            for batch, counts in self.batches():
                with autocast(self.precision, self.device):
                    batch_sums = measure(model, on_device(batch, self.device))
                batch_sums = batch_sums.to(where).double()
                if total is None:
                    total = torch.zeros_like(batch_sums)
                if counts:
                    total += batch_sums
        assert total is not None
        return self.accelerator.reduce(total, "sum").cpu()  # type: ignore[no-any-return]


def wins(apart: Tensor) -> Tensor:
    """Count differences above 0 as 1, and ties as a half: whoever wins them, wins by chance."""
    return (apart.sign() + 1) / 2


def scaled(loss: Loss, step_weight: float, micro_batches: int, world: int) -> Tensor:
    """Share of a micro-batch in the mean over a whole step, to be added up.

    The mean of the micro-batch comes first and then its share, so that micro-batches of one weight
    add 1 / `micro_batches` of their means to the bit.

    `step_weight` is that of all micro-batches of the step on all processes, of which one process
    has `micro_batches`; gradients are averaged over `world` of them.
    """
    if loss.weight:
        share = loss.total / loss.weight * (loss.weight * world / step_weight)
    else:
        share = loss.total * 0.0
    return share if loss.mean is None else share + loss.mean / micro_batches

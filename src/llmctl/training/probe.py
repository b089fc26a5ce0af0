"""How large a batch fits, tried before training on a model that is thrown away."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim import Optimizer

from llmctl import hardware
from llmctl.config.finetuning import Tuning
from llmctl.console import log
from llmctl.errors import ResourceError
from llmctl.numbers import byte_size
from llmctl.training.fault_tolerance import together
from llmctl.training.hyperparameters import Hyperparameters
from llmctl.training.state import generators_kept

MARGIN = 0.9
"""Share of the memory that a batch may take; communication and evaluation need some too."""


def largest_batch(
    optimizers: Sequence[Optimizer],
    loss_of: Callable[[int], Tensor],
    wanted: int,
    device: str,
) -> int:
    """The largest size that fits among those that divide the wanted one into halves.

    The optimizers are over a copy of the model that is thrown away, and what they keep is counted.
    One device should process `wanted` sequences in a step.

    Raises:
        ResourceError: not even one sequence fits.
    """

    def step(size: int) -> None:
        loss_of(size).backward()  # type: ignore[no-untyped-call]
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    sizes, fitting = _halves(wanted), 0
    with generators_kept():
        for size in sizes:
            before = hardware.peak_memory(device)
            if not _fits(step, size, device):
                break
            grown = (hardware.peak_memory(device) - before) / (size - fitting)
            fitting = size
            more = next((s for s in sizes if s > size), size) - size
            if device != "cuda" and grown * more > MARGIN * hardware.memory_left():
                break  # a CPU has no refusal to wait for: the kernel would kill the process
    if not fitting:
        raise ResourceError(
            "out of memory with a single sequence", hint="use a smaller model or a shorter context"
        )
    peak = byte_size(hardware.peak_memory(device))
    log.info("batch size %d of %d fits (%s at the peak)", fitting, wanted, peak)
    return fitting


def fitting_batch(
    model: Any,
    loss_of: Callable[[Any, list[int]], Tensor],
    lengths: Sequence[int],
    total: int,
    config: Tuning,
) -> int:
    """The largest batch that fits, of the longest rows, on a copy of the model.

    `loss_of` a model takes the numbers of rows. One device should process `total` rows in a step.
    """
    copied = deepcopy(model).train()
    if config.activation_checkpointing:
        checkpoint_activations(copied)
    longest = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    optimizer = torch.optim.AdamW([w for w in copied.parameters() if w.requires_grad], lr=0.0)

    def loss(size: int) -> Tensor:
        return loss_of(copied, [longest[i % len(longest)] for i in range(size)])

    return largest_batch([optimizer], loss, total, copied.device.type)


def checkpoint_activations(model: Any) -> None:
    """Compute activations again in the backward pass instead of keeping them."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def agreed_batch(
    attempt: Callable[[int], int],
    values: Hyperparameters,
    known: dict[str, Any] | None,
    accelerator: Accelerator,
    device: str,
) -> Hyperparameters:
    """Cut a step of the same size into the largest batches that fit every rank. Collective.

    `attempt` tries batches up to a size and says the largest that fits; `known` are the
    hyperparameters of the run that is resumed, if one is.
    """
    total, size = values.batch_size * values.grad_accum, values.batch_size
    if known is None:
        with together(accelerator):
            size = attempt(total)
        hardware.release_memory(device)
        size = int(accelerator.gather(torch.tensor([size], device=device)).min())
    elif known["batch_size"] * known["grad_accum"] == total:
        size = known["batch_size"]  # of another step: refused further on
    return replace(values, batch_size=size, grad_accum=total // size)


def _halves(wanted: int) -> list[int]:
    """`wanted`, its half, and so on while it is even; ascending. One is always tried."""
    sizes = [wanted]
    while sizes[-1] % 2 == 0:
        sizes.append(sizes[-1] // 2)
    return sorted({1, *sizes})


def _fits(step: Callable[[int], None], size: int, device: str) -> bool:
    try:
        with hardware.memory_errors():
            step(size)
            if device == "cuda":
                torch.cuda.synchronize()
    except ResourceError:
        return False
    if device != "cuda" or size == 1:
        return True
    _, total = torch.cuda.mem_get_info()
    return hardware.peak_memory(device) <= MARGIN * total

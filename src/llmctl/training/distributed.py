"""Processes and devices through Accelerate; what was asked for and is not in force is an error."""

import os
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import nn
from torch.optim import Optimizer

from llmctl import hardware
from llmctl.config.sections import Placement
from llmctl.errors import ResourceError, UserError


def make_accelerator(placement: Placement) -> tuple[Accelerator, str]:
    """The accelerator and the device's type.

    Raises:
        UserError: several processes or FSDP were asked for and are not in force.
        ResourceError: the device is not there.
    """
    device = hardware.pick_device(placement.device)
    AcceleratorState._reset_state()  # else an earlier stage of this process decides the precision
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=2))  # rank 0 may tokenize first
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision="no", kwargs_handlers=[patience])
    # every rank loads the weights: what transformers leaves on meta elsewhere, nothing can check
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    _require_in_force(placement, accelerator)
    return accelerator, device


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether FSDP is in force."""
    return bool(accelerator.distributed_type.name == "FSDP")


def place(
    accelerator: Accelerator,
    model: nn.Module,
    optimizers: list[Optimizer],
    *,
    may_skip_weights: bool,
) -> tuple[nn.Module, list[Optimizer]]:
    """Put a model and its optimizers where they train, wrapped in DDP or FSDP where that is asked.

    `may_skip_weights` says whether a forward pass may leave weights out, such as a head or experts
    that no token is sent to; DDP then looks for them in every step.
    """
    accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=may_skip_weights)
    placed, *wrapped = accelerator.prepare(model, *optimizers)
    return placed, [optimizer.optimizer for optimizer in wrapped]


def autocast(precision: str, device: str) -> AbstractContextManager[Any]:
    """bfloat16 products where the precision is bf16; sums and weights stay in float32."""
    if precision != "bf16":
        return nullcontext()
    return torch.autocast(device, dtype=torch.bfloat16)


def _require_in_force(placement: Placement, accelerator: Accelerator) -> None:
    world = accelerator.num_processes
    env = os.environ
    # accelerate's single-process launcher sets an address for several, and no rank
    if "ACCELERATE_MIXED_PRECISION" in env and "MASTER_ADDR" in env and "RANK" not in env:
        raise UserError(
            "`accelerate launch` was asked for several CPU processes and started one",
            hint="use --processes N, or torchrun --nproc-per-node N -m llmctl …",
        )
    if placement.processes is not None and placement.processes != world:
        raise UserError(f"--processes {placement.processes}: the launcher started {world}")
    if env.get("ACCELERATE_USE_FSDP") == "true" and not is_sharded(accelerator):
        raise ResourceError(
            "FSDP was asked for, and Accelerate does not run it on this device",
            hint="use GPUs, or a configuration without FSDP",
        )

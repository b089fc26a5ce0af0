"""Processes and devices through Accelerate; what was asked for and is not in force is an error."""

import os
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs

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
    _require_in_force(placement, accelerator)
    return accelerator, device


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether FSDP is in force."""
    return bool(accelerator.distributed_type.name == "FSDP")


class Precise(Protocol):
    """What says in which numbers to compute: a plan does."""

    @property
    def precision(self) -> str:
        """fp32, bf16 or pure-bf16."""


def autocast(plan: Precise, device: str) -> AbstractContextManager[Any]:
    """bfloat16 products where the plan says so; sums and weights stay in float32."""
    if plan.precision != "bf16":
        return nullcontext()
    return torch.autocast(device, dtype=torch.bfloat16)


def _require_in_force(placement: Placement, accelerator: Accelerator) -> None:
    world = accelerator.num_processes
    if _launched_as_one():
        raise UserError(
            "`accelerate launch` was asked for several CPU processes and started one",
            hint="use --processes N, or torchrun --nproc-per-node N -m llmctl …",
        )
    if placement.processes is not None and placement.processes != world:
        raise UserError(f"--processes {placement.processes}: the launcher started {world}")
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and not is_sharded(accelerator):
        raise ResourceError(
            "FSDP was asked for, and Accelerate does not run it on this device",
            hint="use GPUs, or a configuration without FSDP",
        )


def _launched_as_one() -> bool:
    """Accelerate's single-process launcher sets an address for several, and no rank."""
    return (
        "ACCELERATE_MIXED_PRECISION" in os.environ
        and "MASTER_ADDR" in os.environ
        and "RANK" not in os.environ
    )

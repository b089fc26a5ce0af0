"""Processes and devices through Accelerate; what was asked for and is not in force is an error."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import nn
from torch.distributed import DistError
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.optim import Optimizer

from llmctl import hardware, launch
from llmctl.config.sections import Placement
from llmctl.console import log
from llmctl.errors import ResourceError, UserError
from llmctl.training.meeting import Answer, met

ENGINES = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker's data parallelism",
}
"""Variables of Accelerate's that ask for an engine which llmctl does not train with."""
SPLITS = {
    "PARALLELISM_CONFIG_TP_SIZE": "tensor parallelism",
    "PARALLELISM_CONFIG_CP_SIZE": "context parallelism",
    "PARALLELISM_CONFIG_SP_SIZE": "sequence parallelism",
}
"""Variables that have several processes share one batch, of which each would take its own."""
PLACED_BY = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_PARALLELISM_CONFIG", "ACCELERATE_CPU_AFFINITY")
"""Variables that Accelerate may read: they say where weights and processes lie, and no more."""
PREPARING = 2 * 3600.0
"""Seconds that processes wait for rank 0 before training: it may tokenize or download first."""
SILENT = ("timed out", "timeout")
"""Signs in an error of torch's that a process did not answer."""
GONE = (
    *("closed by peer", "peer closed", "connection reset", "broken pipe", "socket"),
    *("remote process", "pair closure", "unreachable", "no route to host"),
)
"""Signs in an error of torch's that a process ended."""
DECIDED_BY = {
    "ACCELERATE_MIXED_PRECISION": "--precision",
    "ACCELERATE_DOWNCAST_BF16": "--precision",
    "ACCELERATE_DYNAMO_BACKEND": "--compile",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "--grad-accum",
    "ACCELERATE_GRADIENT_CLIPPING": "--max-grad-norm",
    "ACCELERATE_TORCH_DEVICE": "--device",
}
"""Variables whose subject a flag decides: what else they ask for is not in force, and is said."""
NOTHING = ("", "0", "1", "false", "no", "none", "off")
"""Values that ask for nothing but what is so anyway; numbers are counts."""


def make_accelerator(placement: Placement) -> tuple[Accelerator, str]:
    """The accelerator and the device's type.

    The flags decide, whatever Accelerate's variables say: those that say more than where weights
    lie are taken out of the environment.

    Raises:
        UserError: an engine was asked for that llmctl does not train with, or another process is
            refused.
        ResourceError: the device is not there, or other processes are not reached.
    """
    _require_supported()
    wants_cpu = placement.device == "auto" and _is_on("ACCELERATE_USE_CPU")
    device = hardware.pick_device("cpu" if wants_cpu else placement.device)
    _drop_settings()
    AcceleratorState._reset_state()  # else an earlier stage of this process decides the precision
    patience = InitProcessGroupKwargs(timeout=timedelta(seconds=placement.peer_timeout))
    try:
        seconds = placement.peer_timeout
        with lost_peers_named(seconds), met(Answer(), seconds):
            accelerator = Accelerator(
                cpu=device == "cpu", mixed_precision="no", kwargs_handlers=[patience]
            )
    except (ImportError, NotImplementedError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"Accelerate refuses its configuration: {reason}",
            hint="recipes/accelerate/ has configurations that work",
        ) from None
    # every rank loads the weights: what transformers leaves on meta elsewhere, nothing can check
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    wait_for_peers(accelerator, PREPARING)
    return accelerator, device


def wait_for_peers(accelerator: Accelerator, seconds: float) -> None:
    """Wait so long for another process from now on, wherever processes wait for each other."""
    if accelerator.num_processes > 1:  # no public function changes it; torchtitan uses this one
        _set_pg_timeout(timedelta(seconds=seconds))


@contextmanager
def lost_peers_named(peer_timeout: float) -> Iterator[None]:
    """Turn the network's error of a process that ended or does not answer into one in words.

    Raises:
        ResourceError: such an error.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error).lower()
        if not launch.is_one_of_several():
            raise
        if any(sign in text for sign in SILENT):
            raise ResourceError(
                f"another process of this run has not answered for {peer_timeout:g} s: its "
                "machine, the network between them, or a disk that is slower than that",
                hint="continue with --resume; --peer-timeout waits longer",
            ) from None
        if isinstance(error, DistError) or any(sign in text for sign in GONE):
            raise ResourceError(
                "another process of this run ended",
                hint="what it said last tells why; continue with --resume",
            ) from None
        raise


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


def _require_supported() -> None:
    """Refuse what Accelerate's variables ask for and llmctl does not do, before they are read."""
    env = os.environ
    # accelerate's single-process launcher sets an address for several, and no rank
    if "ACCELERATE_MIXED_PRECISION" in env and "MASTER_ADDR" in env and "RANK" not in env:
        raise UserError(
            "`accelerate launch` was asked for several CPU processes and started one",
            hint="use --processes N, or torchrun --nproc-per-node N -m llmctl …",
        )
    for name, engine in ENGINES.items():
        if _is_on(name):
            raise _unsupported(f"{name}={env[name]}: {engine} is not supported")
    for name, split in SPLITS.items():
        if _is_on("ACCELERATE_USE_PARALLELISM_CONFIG") and env.get(name, "1") != "1":
            raise _unsupported(f"{name}={env[name]}: {split} is not supported")
    if _is_on("ACCELERATE_USE_FSDP") and env.get("FSDP_VERSION", "1") != "2":
        raise _unsupported("FSDP 1 is asked for, and only FSDP 2 is supported")
    for name, flag in DECIDED_BY.items():
        if env.get(name, "").lower() not in NOTHING:
            log.warning("%s=%s has no effect: %s decides", name, env[name], flag)


def _unsupported(what: str) -> UserError:
    return UserError(
        what, hint="use --processes N, torchrun, or a configuration of recipes/accelerate/"
    )


def _drop_settings() -> None:
    """Take what flags decide, and what decides nothing here, out of the environment."""
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        if name not in PLACED_BY:
            del os.environ[name]


def _is_on(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "t", "yes", "y", "on")


def require_in_force(placement: Placement, accelerator: Accelerator) -> None:
    """Refuse to go on with other processes than were asked for, or without FSDP.

    Raises:
        UserError: a launcher started another number of processes.
        ResourceError: FSDP does not run here.
    """
    world = accelerator.num_processes
    if placement.processes is not None and placement.processes != world:
        raise UserError(f"--processes {placement.processes}: the launcher started {world}")
    if _is_on("ACCELERATE_USE_FSDP") and not is_sharded(accelerator):
        raise ResourceError(
            "FSDP was asked for, and Accelerate does not run it on this device",
            hint="use GPUs, or a configuration without FSDP",
        )

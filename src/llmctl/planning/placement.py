"""Where a run fits: a `Workload` in, ways to shard it and flags that make it fit out."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from llmctl.planning.memory import (
    CUDA_CONTEXT,
    FULL,
    HALF,
    MemoryEstimate,
    estimate_memory,
    weight_bytes,
)
from llmctl.planning.workload import Workload

MARGIN = 0.9
"""Share of a device's memory that a run may take; fragmentation and communication need some."""
LORA_RANK = 16
LAUNCH = "(accelerate launch --config_file recipes/accelerate/fsdp2.yaml)"


@dataclass(frozen=True)
class ShardingOption:
    """One way to use several devices."""

    name: str
    """none, DDP or FSDP2."""
    bytes: float
    """On each device."""
    fits: bool


def sharding_options(workload: Workload, devices: int, capacity: float) -> list[ShardingOption]:
    """List the ways to use a number of devices with so many bytes each, the simplest first."""
    options = [("none" if devices == 1 else "DDP", estimate_memory(workload).peak)]
    if devices > 1 and workload.can_shard:
        options.append(("FSDP2", sharded_bytes(workload, estimate_memory(workload), devices)))
    return [ShardingOption(name, size, size <= MARGIN * capacity) for name, size in options]


def sharded_bytes(workload: Workload, memory: MemoryEstimate, devices: int) -> float:
    """Bytes of each device under FSDP2, which shards weights, gradients and moments.

    Zhao et al., 2023, arXiv:2304.11277; ZeRO stage 3, Rajbhandari et al., 2020, arXiv:1910.02054,
    section 5. Two blocks, or the largest matrix, are gathered at a time, with their gradients.
    """
    parts = memory.parts
    sharded = parts["weights"] + parts["gradients"] + parts["optimizer"]
    number = HALF if workload.is_half else FULL
    gathered = 2 * number * max(2 * workload.shape.layer_parameters, workload.shape.head_matrix)
    context = CUDA_CONTEXT if workload.device == "cuda" else 0
    return sharded / devices + parts["activations"] + parts["logits"] + gathered + context


@dataclass(frozen=True)
class FittingFlags:
    """Flags with which a run fits."""

    flags: str
    """To add or to change, empty where it fits as it is."""
    bytes: float


def find_fitting_flags(workload: Workload, devices: int, capacity: float) -> FittingFlags | None:
    """Find the least change with which a run fits, None where nothing helps."""
    for changed, flags in _memory_flags(workload):
        for smaller, more in _smaller_batches(changed):
            for option in sharding_options(smaller, devices, capacity):
                if option.fits:
                    parts = (more, flags, LAUNCH if option.name == "FSDP2" else "")
                    return FittingFlags(" ".join(filter(None, parts)), option.bytes)
    return None


def _memory_flags(workload: Workload) -> Iterator[tuple[Workload, str]]:
    """The workload with more and more of the flags that save memory."""
    yield workload, ""
    flags = []
    if workload.stage in ("sft", "dpo", "reward") and not workload.is_checkpointed:
        workload = replace(workload, is_checkpointed=True)
        flags.append("--activation-checkpointing")
        yield workload, " ".join(flags)
    if workload.stage in ("sft", "dpo") and workload.logit_share and not workload.is_chunked:
        workload = replace(workload, is_chunked=True)
        flags.append("--chunked-loss")
        yield workload, " ".join(flags)
    if workload.stage in ("sft", "dpo", "reward", "ppo") and not workload.has_adapter:
        workload = replace(
            workload,
            has_adapter=True,
            lora_rank=LORA_RANK,
            trained=low_rank_parameters(workload, LORA_RANK),
        )
        flags.append("--lora")
        yield workload, " ".join(flags)
    quantizable = workload.stage in ("sft", "dpo", "ppo") and workload.logit_share
    if quantizable and workload.load_in == "full":
        flags.append("--load-in-4bit")
        yield replace(workload, load_in="4bit"), " ".join(flags)


def _smaller_batches(workload: Workload) -> Iterator[tuple[Workload, str]]:
    """The workload with smaller passes, a step keeping its size; PPO's are limited in tokens."""
    yield workload, ""
    size = workload.batch_size
    while size > 1 and workload.ppo is not None:
        size //= 2
        yield replace(workload, batch_size=size), f"--pass-tokens {size * workload.length}"
    sides = 2 if workload.stage in ("dpo", "reward") else 1
    size, passes = workload.batch_size // sides, workload.grad_accum
    while size > 1 and workload.ppo is None:
        half = size // 2 if size % 2 == 0 else 1
        passes, size = passes * size // half, half
        flags = f"--batch-size {size} --grad-accum {passes}"
        yield replace(workload, batch_size=size * sides, grad_accum=passes), flags


def low_rank_parameters(workload: Workload, rank: int) -> int:
    """Parameters of adapters on every linear layer of the blocks, rank x (in + out) of each.

    Hu et al., 2021, arXiv:2106.09685, section 4.1.
    """
    shape = workload.shape
    attention = 4 * shape.hidden + 2 * shape.query + 2 * shape.key_value
    feed_forward = (3 if shape.is_gated else 2) * (shape.hidden + shape.intermediate)
    if shape.has_joint_projection:
        attention = 2 * shape.hidden + 2 * shape.query + 2 * shape.key_value
    return rank * shape.layers * (attention + feed_forward)


def bytes_per_parameter(workload: Workload) -> float:
    """Bytes of weights, gradients and moments for each parameter: 16 where all train with Adam.

    Rajbhandari et al., 2020, arXiv:1910.02054, section 3.1: 2 + 2 bytes and K = 12 in fp16 with
    float32 copies. Here weights are in float32, 4 + 4 + 8, and autocast makes copies for a pass.
    """
    parts = estimate_memory(workload).parts
    states = parts["gradients"] + parts["optimizer"] + weight_bytes(workload)
    return states / workload.shape.parameters

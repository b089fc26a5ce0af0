"""Where a run fits: on one device, on N of them, and with which flags; a `Work` in, choices out."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from llmctl.planning.memory import CUDA_CONTEXT, FULL, HALF, Memory, memory_of, weight_bytes
from llmctl.planning.work import Work

MARGIN = 0.9
"""Share of a device's memory that a run may take; fragments and communication need some too."""
LORA_RANK = 16


@dataclass(frozen=True)
class Placing:
    """One way to spread a run."""

    name: str
    """none, DDP or FSDP2."""
    bytes: float
    """On each device."""
    fits: bool


def placings(work: Work, devices: int, capacity: float) -> list[Placing]:
    """The ways to use so many devices, the simplest first.

    Args:
        work: on this many devices.
        devices: at hand.
        capacity: bytes of each.
    """
    found = [("none" if devices == 1 else "DDP", memory_of(work).peak)]
    if devices > 1 and work.can_shard:
        found.append(("FSDP2", sharded_bytes(work, memory_of(work), devices)))
    return [Placing(name, size, size <= MARGIN * capacity) for name, size in found]


def sharded_bytes(work: Work, memory: Memory, devices: int) -> float:
    """Of each device under FSDP2, which splits weights, gradients and moments (Zhao et al., 2023,
    arXiv:2304.11277; ZeRO stage 3, Rajbhandari et al., 2020, arXiv:1910.02054, section 5).

    Two blocks, or the largest matrix, are whole at a time, with their gradients.
    """
    parts = memory.parts
    split = parts["weights"] + parts["gradients"] + parts["optimizer"]
    number = HALF if work.is_half else FULL
    whole = 2 * number * max(2 * work.shape.layer_parameters, work.shape.head_matrix)
    context = CUDA_CONTEXT if work.device == "cuda" else 0
    return split / devices + parts["activations"] + parts["logits"] + whole + context


@dataclass(frozen=True)
class Choice:
    """A way to make a run fit."""

    flags: str
    """To add or to change, empty where it fits as it is."""
    bytes: float


def choose(work: Work, devices: int, capacity: float) -> Choice | None:
    """The least change with which a run fits, None where nothing helps."""
    for changed, flags in _changes(work):
        for placing in placings(changed, devices, capacity):
            if placing.fits:
                return Choice(_with_sharding(flags, placing), placing.bytes)
    return None


def _with_sharding(flags: str, placing: Placing) -> str:
    launch = "accelerate launch --config_file recipes/accelerate/fsdp2.yaml"
    return f"{flags} ({launch})".strip() if placing.name == "FSDP2" else flags


def _changes(work: Work) -> Iterator[tuple[Work, str]]:
    """A run as it is, with smaller batches, and with what saves memory besides, in this order."""
    for changed, flags in _savings(work):
        for smaller, more in _batches(changed):
            yield smaller, " ".join(part for part in (more, flags) if part)


def _savings(work: Work) -> Iterator[tuple[Work, str]]:
    """What the command has to save memory with."""
    yield work, ""
    flags = []
    if work.stage in ("sft", "dpo", "reward") and not work.is_checkpointed:
        work = replace(work, is_checkpointed=True)
        flags.append("--activation-checkpointing")
        yield work, " ".join(flags)
    if work.stage in ("sft", "dpo") and work.counted and not work.is_chunked:
        work = replace(work, is_chunked=True)
        flags.append("--chunked-loss")
        yield work, " ".join(flags)
    if work.stage in ("sft", "dpo", "reward", "ppo") and not work.has_adapter:
        work = replace(
            work,
            has_adapter=True,
            rank=LORA_RANK,
            trained=low_rank_parameters(work, LORA_RANK),
        )
        flags.append("--lora")
        yield work, " ".join(flags)
    quantizable = work.stage in ("sft", "dpo", "ppo") and work.counted
    if quantizable and work.load_in == "full":
        flags.append("--load-in-4bit")
        yield replace(work, load_in="4bit"), " ".join(flags)


def _batches(work: Work) -> Iterator[tuple[Work, str]]:
    """Smaller passes, a step keeping its size; PPO's passes are limited in tokens."""
    yield work, ""
    size = work.batch_size
    while size > 1 and work.episodes is not None:
        size //= 2
        yield replace(work, batch_size=size), f"--pass-tokens {size * work.length}"
    sides = 2 if work.stage in ("dpo", "reward") else 1
    size, passes = work.batch_size // sides, work.grad_accum
    while size > 1 and work.episodes is None:
        half = size // 2 if size % 2 == 0 else 1
        passes, size = passes * size // half, half
        flags = f"--batch-size {size} --grad-accum {passes}"
        yield replace(work, batch_size=size * sides, grad_accum=passes), flags


def low_rank_parameters(work: Work, rank: int) -> int:
    """Of adapters on every linear layer of the blocks: rank x (in + out) of each (Hu et al., 2021,
    arXiv:2106.09685, section 4.1), of a block with these widths.
    """
    shape = work.shape
    attention = 4 * shape.hidden + 2 * shape.query + 2 * shape.key_value
    forward = (3 if shape.is_gated else 2) * (shape.hidden + shape.intermediate)
    if shape.has_joint_projection:
        attention = 2 * shape.hidden + 2 * shape.query + 2 * shape.key_value
    return rank * shape.layers * (attention + forward)


def bytes_per_parameter(work: Work) -> float:
    """Weights, gradients and moments of a parameter that trains: 16 with Adam.

    Rajbhandari et al., 2020, arXiv:1910.02054, section 3.1: 2 + 2 bytes and K = 12 in fp16 with
    float32 copies. Here weights are in float32, 4 + 4 + 8, and autocast makes copies for a pass.
    """
    parts = memory_of(work).parts
    lasting = parts["gradients"] + parts["optimizer"] + weight_bytes(work)
    return lasting / work.shape.parameters

"""Bytes on each device, part by part and phase by phase: a `Work` in, a `Memory` out.

Counted is what tensors hold. What is not: Python and its libraries, the data, what an allocator
keeps of freed memory. A CPU run's peak may be its checkpoint, which is copied before it is written;
on a GPU that copy is in the machine's memory.
"""

from dataclasses import dataclass

from llmctl.planning.activations import (
    FULL,
    HALF,
    backward_bytes,
    copied_bytes,
    forward_bytes,
    kept_bytes,
    layer_bytes,
    logit_bytes,
)
from llmctl.planning.work import Work

CUDA_CONTEXT = 500_000_000
"""Bytes of a CUDA context and its libraries' workspaces, about."""
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Of a weight: four bits, a byte of scale for 64 of them, and a float for 256 of those (Dettmers et
al., 2023, arXiv:2305.14314, section 3)."""
PHASES = ("forward and backward", "update", "evaluation", "rollout", "checkpoint")


@dataclass(frozen=True)
class Memory:
    """Bytes of one device."""

    parts: dict[str, float]
    phases: dict[str, float]
    """What is held at the height of each phase."""
    host: float
    """Of the machine's memory besides, where the device has its own."""

    @property
    def peak(self) -> float:
        """The most at any time."""
        return max(self.phases.values())

    @property
    def peak_phase(self) -> str:
        """When that is."""
        return max(self.phases, key=self.phases.__getitem__)


def memory_of(work: Work) -> Memory:
    """Bytes of a run that is not sharded."""
    parts = _lasting(work)
    steady = parts["weights"] + parts["optimizer"] + parts["other models"]
    gradients, activations = parts["gradients"], parts["activations"] + parts["copies"]
    held = gradients if work.grad_accum > 1 or work.episodes is not None else 0.0
    # a layer's gradients take the place of its activations, one layer after the other
    begins = held + activations + max(parts["logits"], backward_bytes(work))
    tokens = work.batch_size * work.length
    ends = gradients + min(activations, tokens * layer_bytes(work) + backward_bytes(work))
    buckets = gradients if work.world > 1 else 0.0
    context = CUDA_CONTEXT if work.device == "cuda" else 0
    phases = {
        "forward and backward": steady + buckets + max(begins, ends),
        "update": steady + buckets + gradients + parts["workspace"],
        "evaluation": steady + _evaluation(work),
    }
    if work.episodes is not None:
        phases["rollout"] = steady + parts["rollout"] + parts["KV cache"]
    copied = trained_bytes(work) + parts["optimizer"]
    if work.device != "cuda":
        phases["checkpoint"] = steady + copied
        copied = 0.0
    return Memory(parts, {name: value + context for name, value in phases.items()}, copied)


def trained_bytes(work: Work) -> float:
    """Of the weights that train, all models together."""
    return _trained(work) * (HALF if work.precision == "pure-bf16" else FULL)


def weight_bytes(work: Work) -> float:
    """Of the model as it is held, with its adapter."""
    shape = work.shape
    whole = HALF if work.precision == "pure-bf16" else FULL
    if work.load_in == "full":
        return whole * shape.parameters + (work.trained * whole if work.has_adapter else 0)
    small = shape.divisible if work.load_in == "4bit" else shape.matrices
    bits = NF4_BYTES if work.load_in == "4bit" else 1.0
    rest = HALF if work.device == "cuda" and work.is_half else FULL
    return small * bits + (shape.parameters - small) * rest + work.trained * FULL


def cache_bytes(work: Work, sequences: int, tokens: int) -> float:
    """Keys and values of so many sequences of so many tokens."""
    shape = work.shape
    return 2.0 * shape.layers * shape.key_value * sequences * tokens * (HALF if work.is_half else 4)


def _lasting(work: Work) -> dict[str, float]:
    """The parts, whenever each of them is held."""
    episodes, trained = work.episodes, _trained(work)
    number = HALF if work.precision == "pure-bf16" else FULL
    parts = {
        "weights": weight_bytes(work),
        "other models": _others(work),
        "gradients": float(number * trained),
        "optimizer": _optimizer(work, trained, number),
        "activations": kept_bytes(work),
        "copies": copied_bytes(work),
        "logits": logit_bytes(work),
        "workspace": _workspace(work),
        "KV cache": 0.0,
        "rollout": 0.0,
    }
    if episodes is not None:
        tokens = episodes.prompt + episodes.response
        sequences = min(episodes.rollout, episodes.per_step)
        parts["KV cache"] = cache_bytes(work, sequences, tokens)
        matrices = work.shape.matrices if work.load_in == "full" else 0
        # the fast pass lays weights side by side; two copies of a row's logits sample its token
        parts["rollout"] = matrices * (HALF if work.is_half else FULL)
        parts["rollout"] += 2.0 * sequences * work.shape.vocabulary * FULL
    return parts


def _trained(work: Work) -> int:
    """Parameters that train, in PPO those of the value model too."""
    if work.episodes is None:
        return work.trained
    head = 0 if work.has_adapter else work.shape.parts["head"]
    return 2 * work.trained - head + work.shape.hidden


def _others(work: Work) -> float:
    """Models beside the one that trains: PPO's value model, reference and reward models.

    With an adapter they stand on the policy's weights, and only what is added counts.
    """
    if work.episodes is None:
        return 0.0
    number = HALF if work.precision == "pure-bf16" else FULL
    value = (_trained(work) - work.trained) * number
    reference = 0.0 if work.has_adapter else work.shape.parameters * number
    return value + reference + work.episodes.judges * FULL


def _optimizer(work: Work, trained: int, number: int) -> float:
    """Two moments of every weight that trains; of Muon's matrices one; in 8 bits a byte each."""
    if work.optimizer in ("adamw-8bit", "paged-adamw-8bit"):
        return trained * 2 * (1 + FULL / 256)
    moments = 2 * trained - (work.shape.muon if work.optimizer == "muon" else 0)
    return float(moments * number)


def _workspace(work: Work) -> float:
    """What Muon's update holds of its largest stack.

    Nesterov's updates and their stack in float32, three of it in bf16 in the iteration, and two
    Gram matrices of each.
    """
    if work.optimizer != "muon":
        return 0.0
    return (2 * FULL + 3 * HALF) * work.shape.stack + 2 * HALF * work.shape.stack_square


def _evaluation(work: Work) -> float:
    """A pass without gradients: pretraining takes twice the batch and all logits."""
    factor = 2 if work.keeps_logits else 1
    tokens = factor * work.batch_size * work.length
    logits = tokens * work.counted * work.shape.vocabulary * bool(work.shape.head_matrix)
    if work.is_chunked or work.episodes is not None:
        logits = 0
    number = 2 * FULL + (HALF if work.precision == "bf16" else 0)
    return max(logits * number, tokens * forward_bytes(work)) + copied_bytes(work)

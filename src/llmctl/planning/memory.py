"""Bytes on each device, part by part and phase by phase: a `Work` in, a `Memory` out.

Counted is what tensors hold. What is not: Python and its libraries, the data, what an allocator
keeps of freed memory. A CPU run's peak may be its checkpoint, which is copied before it is written;
on a GPU that copy is in the machine's memory.

What a forward pass keeps for its backward pass follows from the shape; what it rests on is counted
in the tests, tensor by tensor, on models of every kind that is told apart here. The idea is
Korthikanti et al., 2022, arXiv:2205.05198, section 4.1 (s b h (34 + 5 a s / h) for one layer of GPT
in 16 bits); the terms are those of transformers' modules, whose operations each keep their inputs.
"""

from dataclasses import dataclass

from llmctl.models.patched_attention import SHORT
from llmctl.planning.shape import Shape
from llmctl.planning.work import Work

FULL, HALF = 4, 2
"""Bytes of a number in float32 and in bfloat16."""

CUDA_CONTEXT = 500_000_000
"""Bytes of a CUDA context and its libraries' workspaces, about."""
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Of a weight: four bits, a byte of scale for 64 of them, and a float for 256 of those (Dettmers et
al., 2023, arXiv:2305.14314, section 3)."""
PHASES = ("forward and backward", "update", "evaluation", "rollout", "checkpoint")


def layer_bytes(work: Work) -> float:
    """Of one block for one token."""
    shape, size = work.shape, _size(work)
    return _norms(work) + _attention(work, size) + _feed_forward(shape, size, work) + _drop(work)


def kept_bytes(work: Work) -> float:
    """Of a pass over a batch, without logits: blocks, the last norm, and bf16 copies of weights."""
    tokens, shape = work.batch_size * work.length, work.shape
    last = tokens * shape.hidden * (2 * FULL + _size(work))
    if work.has_adapter:  # nothing before the first adapter trains, so the first norm keeps nothing
        last -= tokens * shape.hidden * FULL
    if work.is_checkpointed:
        blocks = tokens * (shape.layers * shape.hidden * FULL + layer_bytes(work))
    else:
        blocks = tokens * shape.layers * layer_bytes(work)
    return blocks + last


def copied_bytes(work: Work) -> float:
    """bf16 copies of float32 matrices that autocast makes and the backward pass needs."""
    if work.precision != "bf16" or (work.load_in != "full" and work.device == "cuda"):
        return 0.0
    shape = work.shape
    matrices = shape.matrices if work.load_in == "full" else 0
    if work.is_checkpointed:
        matrices //= shape.layers
    return HALF * (matrices + shape.head_matrix)


def backward_bytes(work: Work) -> float:
    """Of gradients of activations at once, beyond what they replace: those of a feed-forward layer.

    The gradients of its product, of the activation and of the second matrix's output stand beside
    two of the residual stream; the product itself is gone by then.
    """
    shape = work.shape
    return work.batch_size * work.length * (2 * shape.intermediate + 2 * shape.hidden) * _size(work)


def forward_bytes(work: Work) -> float:
    """Of a pass that keeps nothing: a block's largest tensors, for one token."""
    return (3 * work.shape.intermediate + 4 * work.shape.hidden) * _size(work)


def logit_bytes(work: Work) -> float:
    """At the start of the backward pass: of each logit its log-softmax and two gradients."""
    if not work.counted or not work.shape.head_matrix:
        return 0.0
    positions = work.batch_size * work.length * work.counted
    logits = positions * work.shape.vocabulary
    if work.episodes is not None:
        logits = min(logits, work.episodes.most_logits)
    if work.is_chunked:
        from llmctl.training.token_loss import CHUNK_LOGITS

        logits = min(logits, CHUNK_LOGITS)
    return 3 * logits * FULL + positions * work.shape.hidden * FULL


def _size(work: Work) -> int:
    return HALF if work.is_half else FULL


def _norms(work: Work) -> float:
    """Two norms: the input, and of RMSNorm the normalised input where its weight trains.

    Their output is kept once in float32, and in bf16 once by every matrix that reads it.
    """
    shape, size = work.shape, _size(work)
    stream = HALF if work.precision == "pure-bf16" else FULL
    inputs = stream if not shape.has_rms_norm or work.has_adapter else 2 * FULL
    if shape.has_rms_norm and work.precision == "pure-bf16":
        inputs = FULL + (0 if work.has_adapter else HALF)
    if work.precision == "bf16":
        readers = (1 if shape.has_joint_projection else 3) + (2 if shape.is_gated else 1)
    else:
        readers = 2
    return shape.hidden * (2 * inputs + readers * size)


def _attention(work: Work, size: int) -> float:
    """Queries, keys, values and the output, and the logarithm of each softmax's sum.

    Scores are held only where dropout of them keeps a CPU from its flash kernel.
    """
    shape = work.shape
    kept = (2 * shape.query + 2 * shape.key_value) * size + shape.heads * FULL
    if _is_exact(work):  # and the output is cast for the matrix that reads it
        kept += (2 * shape.query + 2 * shape.key_value) * (FULL - size) + shape.query * HALF
    elif work.has_adapter and work.precision == "bf16":
        kept += shape.query * HALF  # PEFT casts the output up, and autocast down again
    if shape.has_query_norm:
        kept += (shape.query + shape.key_value) * (FULL + (0 if work.has_adapter else size))
    if shape.attention_dropout and work.device == "cpu":
        kept += 3 * shape.heads * work.length * FULL
        kept -= shape.query * FULL if _is_exact(work) else 0  # no kernel that keeps its output
    return kept


def _is_exact(work: Work) -> bool:
    """Whether `llmctl.models.patched_attention` computes in float32 what would be in bf16."""
    short = work.length * work.shape.head_size <= SHORT
    return work.device == "cpu" and work.is_half and short


def _feed_forward(shape: Shape, size: int, work: Work) -> float:
    """What the activation function keeps, the gate's partner, and the second matrix's input."""
    tensors = shape.activation + (3 if shape.is_gated else 1)
    low_rank = _layers_adapted(shape) * work.rank
    return (tensors * shape.intermediate + low_rank) * size


def _layers_adapted(shape: Shape) -> int:
    """Linear layers of a block, each with what its adapter's first half gives."""
    return (2 if shape.has_joint_projection else 4) + (3 if shape.is_gated else 2)


def _drop(work: Work) -> float:
    """The masks of two dropouts."""
    return 2 * work.shape.hidden * FULL if work.shape.dropout else 0.0


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

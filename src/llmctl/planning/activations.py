"""Bytes that a forward pass keeps for its backward pass, from a shape; what they rest on is counted
in the tests, tensor by tensor, on models of every kind that is told apart here.

The idea is Korthikanti et al., 2022, arXiv:2205.05198, section 4.1 (s b h (34 + 5 a s / h) for one
layer of GPT in 16 bits); the terms are those of transformers' modules, whose operations each keep
their inputs.
"""

from llmctl.attention import SHORT
from llmctl.planning.shape import Shape
from llmctl.planning.work import Work

FULL, HALF = 4, 2
"""Bytes of a number in float32 and in bfloat16."""


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
    """Whether `llmctl.attention` computes in float32 what would be in bf16."""
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

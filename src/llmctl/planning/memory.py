"""Bytes on each device, by part and by phase: a `Workload` in, a `MemoryEstimate` out.

Counted is what tensors hold. What is not: Python and its libraries, the data, what an allocator
keeps of freed memory. A CPU run's peak may be its checkpoint, which is copied before it is written;
on a GPU that copy is in the machine's memory.

The activations that a forward pass saves follow from the shape as in Korthikanti et al., 2022,
arXiv:2205.05198, section 4.1 (s b h (34 + 5 a s / h) for one layer of GPT in 16 bits), with the
terms of transformers' modules, whose operations each save their inputs. Tests count them, tensor by
tensor, on models of every kind that is told apart here.
"""

from dataclasses import dataclass

from llmctl.models.patched_attention import SHORT
from llmctl.planning.workload import Workload

FULL, HALF = 4, 2
"""Bytes of a number in float32 and in bfloat16."""

CUDA_CONTEXT = 500_000_000
"""Bytes of a CUDA context and its libraries' workspaces, about."""
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight: four bits, a byte of scale for 64 of them, and a float for 256 of those
(Dettmers et al., 2023, arXiv:2305.14314, section 3)."""


def block_activation_bytes(workload: Workload) -> float:
    """Activations that one block saves for one token."""
    masks = 2 * workload.shape.hidden * FULL if workload.shape.dropout else 0.0
    return _norms(workload) + _attention(workload) + _feed_forward(workload) + masks


def activation_bytes(workload: Workload) -> float:
    """Activations that a pass over a batch saves, without logits: of blocks and the last norm."""
    tokens, shape = workload.pass_tokens, workload.shape
    last = tokens * shape.hidden * (2 * FULL + _size(workload))
    if workload.has_adapter:  # nothing before the first one trains: the first norm saves nothing
        last -= tokens * shape.hidden * FULL
    if workload.is_checkpointed:
        blocks = tokens * (shape.layers * shape.hidden * FULL + block_activation_bytes(workload))
    else:
        blocks = tokens * shape.layers * block_activation_bytes(workload)
    return blocks + last


def autocast_copy_bytes(workload: Workload) -> float:
    """bf16 copies of float32 matrices that autocast makes and the backward pass needs."""
    if workload.precision != "bf16" or (workload.load_in != "full" and workload.device == "cuda"):
        return 0.0
    shape = workload.shape
    matrices = shape.matrices if workload.load_in == "full" else 0
    if workload.is_checkpointed:
        matrices //= shape.layers
    return HALF * (matrices + shape.head_matrix)


def block_gradient_bytes(workload: Workload) -> float:
    """Most gradients of activations at once, beyond those they replace: of a feed-forward layer.

    The gradients of its product, of the activation and of the second matrix's output stand beside
    two of the residual stream; the product itself is gone by then.
    """
    shape = workload.shape
    return workload.pass_tokens * 2 * (shape.intermediate + shape.hidden) * _size(workload)


def logit_bytes(workload: Workload) -> float:
    """Log-softmax and two gradients of each logit, at the start of the backward pass."""
    if not workload.logit_share or not workload.shape.head_matrix:
        return 0.0
    positions = workload.pass_tokens * workload.logit_share
    logits = positions * workload.shape.vocabulary
    if workload.ppo is not None:
        logits = min(logits, workload.ppo.max_logits)
    if workload.is_chunked:
        from llmctl.training.token_loss import CHUNK_LOGITS

        logits = min(logits, CHUNK_LOGITS)
    return 3 * logits * FULL + positions * workload.shape.hidden * FULL


def _size(workload: Workload) -> int:
    """Bytes of an activation."""
    return HALF if workload.is_half else FULL


def _weight_size(workload: Workload) -> int:
    """Bytes of a weight that trains, of its gradient and of its moments."""
    return HALF if workload.precision == "pure-bf16" else FULL


def _norms(workload: Workload) -> float:
    """Two norms: the input, and of RMSNorm the normalised input where its weight trains.

    Their output is kept once in float32, and in bf16 once by every matrix that reads it.
    """
    shape, size = workload.shape, _size(workload)
    inputs = _weight_size(workload) if not shape.has_rms_norm or workload.has_adapter else 2 * FULL
    if shape.has_rms_norm and workload.precision == "pure-bf16":
        inputs = FULL + (0 if workload.has_adapter else HALF)
    if workload.precision == "bf16":
        readers = (1 if shape.has_joint_projection else 3) + (2 if shape.is_gated else 1)
    else:
        readers = 2
    return shape.hidden * (2 * inputs + readers * size)


def _attention(workload: Workload) -> float:
    """Queries, keys, values and the output, and the logarithm of each softmax's sum.

    Scores are held only where dropout of them keeps a CPU from its flash kernel.
    """
    shape, size = workload.shape, _size(workload)
    saved = (2 * shape.query + 2 * shape.key_value) * size + shape.heads * FULL
    if _is_exact(workload):  # and the output is cast for the matrix that reads it
        saved += (2 * shape.query + 2 * shape.key_value) * (FULL - size) + shape.query * HALF
    elif workload.has_adapter and workload.precision == "bf16":
        saved += shape.query * HALF  # PEFT casts the output up, and autocast down again
    if shape.has_query_norm:
        saved += (shape.query + shape.key_value) * (FULL + (0 if workload.has_adapter else size))
    if shape.attention_dropout and workload.device == "cpu":
        saved += 3 * shape.heads * workload.length * FULL
        saved -= shape.query * FULL if _is_exact(workload) else 0  # no kernel that keeps its output
    return saved


def _is_exact(workload: Workload) -> bool:
    """Whether `llmctl.models.patched_attention` computes attention in float32 for bf16."""
    short = workload.length * workload.shape.head_size <= SHORT
    return workload.device == "cpu" and workload.is_half and short


def _feed_forward(workload: Workload) -> float:
    """Tensors of the activation function, the gate's partner, and the second matrix's input."""
    shape = workload.shape
    tensors = shape.activation + (3 if shape.is_gated else 1)
    adapted = (2 if shape.has_joint_projection else 4) + (3 if shape.is_gated else 2)
    low_rank = adapted * workload.lora_rank  # activation of each linear layer's adapter
    return (tensors * shape.intermediate + low_rank) * _size(workload)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device."""

    parts: dict[str, float]
    phases: dict[str, float]
    """Most bytes at once of each phase."""
    host: float
    """Bytes of the machine's memory, where the device has its own."""

    @property
    def peak(self) -> float:
        """Bytes of the largest phase."""
        return max(self.phases.values())

    @property
    def peak_phase(self) -> str:
        """The largest phase."""
        return max(self.phases, key=self.phases.__getitem__)


def estimate_memory(workload: Workload) -> MemoryEstimate:
    """Estimate the bytes of a run that is not sharded."""
    parts = _parts(workload)
    steady = parts["weights"] + parts["optimizer"] + parts["other models"]
    gradients, activations = parts["gradients"], parts["activations"] + parts["copies"]
    held = gradients if workload.grad_accum > 1 or workload.ppo is not None else 0.0
    # a layer's gradients take the place of its activations, one layer after the other
    first = held + activations + max(parts["logits"], block_gradient_bytes(workload))
    block = workload.pass_tokens * block_activation_bytes(workload)
    last = gradients + min(activations, block + block_gradient_bytes(workload))
    buckets = gradients if workload.world > 1 else 0.0
    phases = {
        "forward and backward": steady + buckets + max(first, last),
        "update": steady + buckets + gradients + parts["workspace"],
        "evaluation": steady + _evaluation(workload),
    }
    if workload.ppo is not None:
        phases["rollout"] = steady + parts["rollout"] + parts["KV cache"]
    copied = trained_parameters(workload) * _weight_size(workload) + parts["optimizer"]
    if workload.device == "cuda":
        phases = {name: held + CUDA_CONTEXT for name, held in phases.items()}
        return MemoryEstimate(parts, phases, copied)
    return MemoryEstimate(parts, {**phases, "checkpoint": steady + copied}, 0.0)


def trained_parameters(workload: Workload) -> int:
    """Parameters that train, in PPO those of the value model too."""
    if workload.ppo is None:
        return workload.trained
    head = 0 if workload.has_adapter else workload.shape.parts["head"]
    return 2 * workload.trained - head + workload.shape.hidden


def weight_bytes(workload: Workload) -> float:
    """Bytes of the model as it is loaded, with its adapter."""
    shape, size = workload.shape, _weight_size(workload)
    if workload.load_in == "full":
        return size * shape.parameters + (workload.trained * size if workload.has_adapter else 0)
    quantized = shape.quantizable if workload.load_in == "4bit" else shape.matrices
    quantized_size = NF4_BYTES if workload.load_in == "4bit" else 1.0
    rest = HALF if workload.device == "cuda" and workload.is_half else FULL
    kept = (shape.parameters - quantized) * rest
    return quantized * quantized_size + kept + workload.trained * FULL


def kv_cache_bytes(workload: Workload, sequences: int, tokens: int) -> float:
    """Bytes of keys and values of sequences of some tokens each."""
    width = 2.0 * workload.shape.layers * workload.shape.key_value
    return width * sequences * tokens * _size(workload)


def _parts(workload: Workload) -> dict[str, float]:
    """Bytes of each part, whenever it is held."""
    parts = {
        "weights": weight_bytes(workload),
        "other models": _other_models(workload),
        "gradients": float(_weight_size(workload) * trained_parameters(workload)),
        "optimizer": _optimizer(workload),
        "activations": activation_bytes(workload),
        "copies": autocast_copy_bytes(workload),
        "logits": logit_bytes(workload),
        "workspace": _muon_workspace(workload),
        "KV cache": 0.0,
        "rollout": 0.0,
    }
    ppo = workload.ppo
    if ppo is not None:
        tokens = ppo.prompt_tokens + ppo.response_tokens
        sequences = min(ppo.rollout_batch_size, ppo.episodes)
        parts["KV cache"] = kv_cache_bytes(workload, sequences, tokens)
        matrices = workload.shape.matrices if workload.load_in == "full" else 0
        # the fused pass copies weights side by side; two copies of a row's logits sample its token
        parts["rollout"] = matrices * _size(workload)
        parts["rollout"] += 2.0 * sequences * workload.shape.vocabulary * FULL
    return parts


def _other_models(workload: Workload) -> float:
    """Bytes of PPO's value model, reference and reward models.

    With an adapter they stand on the policy's weights, and only what is added counts.
    """
    if workload.ppo is None:
        return 0.0
    value = trained_parameters(workload) - workload.trained
    reference = 0 if workload.has_adapter else workload.shape.parameters
    rewards = float(workload.ppo.reward_parameters)
    return (value + reference) * _weight_size(workload) + rewards * FULL


def _optimizer(workload: Workload) -> float:
    """Bytes of two moments a weight that trains, in 8 bits a byte each; of Muon's matrices one."""
    trained = trained_parameters(workload)
    if workload.optimizer in ("adamw-8bit", "paged-adamw-8bit"):
        return trained * 2 * (1 + FULL / 256)
    moments = 2 * trained - (workload.shape.muon if workload.optimizer == "muon" else 0)
    return float(moments * _weight_size(workload))


def _muon_workspace(workload: Workload) -> float:
    """Bytes that Muon's update holds of its largest stack.

    Nesterov's updates and their stack in float32, three of it in bf16 in the iteration, and two
    Gram matrices of each.
    """
    if workload.optimizer != "muon":
        return 0.0
    return (2 * FULL + 3 * HALF) * workload.shape.muon_stack + 2 * HALF * workload.shape.muon_gram


def _evaluation(workload: Workload) -> float:
    """Bytes of a pass without gradients: pretraining takes twice the batch and all logits."""
    shape, tokens = workload.shape, workload.pass_tokens * (2 if workload.keeps_logits else 1)
    logits = tokens * workload.logit_share * shape.vocabulary * bool(shape.head_matrix)
    if workload.is_chunked or workload.ppo is not None:
        logits = 0
    logit_size = 2 * FULL + (HALF if workload.precision == "bf16" else 0)
    largest = 3 * shape.intermediate + 4 * shape.hidden  # of a block, where nothing is saved
    forward = tokens * largest * _size(workload)
    return max(logits * logit_size, forward) + autocast_copy_bytes(workload)

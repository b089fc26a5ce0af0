"""What is to be done, whichever command does it: the numbers that memory and time follow from."""

from dataclasses import dataclass

from llmctl.models.quantized import LoadIn
from llmctl.planning.shape import Shape


@dataclass(frozen=True)
class Episodes:
    """What PPO does beside training: sampling, and models that only look."""

    per_step: int
    """Episodes of a step on one device."""
    prompt: int
    """Tokens of the longest prompt."""
    response: int
    """Most tokens of a response."""
    rollout: int
    """Most sequences that are sampled at once."""
    passes: int
    """Over the episodes of a step."""
    judges: int
    """Parameters of reward models with weights of their own."""
    most_logits: int
    """Of a forward and backward pass."""


@dataclass(frozen=True)
class Work:
    """A run on its devices."""

    stage: str
    shape: Shape
    device: str
    world: int
    precision: str
    optimizer: str
    trained: int
    """Parameters that train, of the policy in PPO."""
    has_adapter: bool
    load_in: LoadIn
    rank: int
    """Of low-rank adapters; 0 without."""
    batch_size: int
    """Sequences of a forward pass, the two sides of a pair counted."""
    grad_accum: int
    length: int
    """Tokens of the longest sequence."""
    mean_length: float
    """Of a sequence as it comes, without padding."""
    counted: float
    """Share of the positions that logits are computed of; 0 for a model that scores."""
    is_chunked: bool
    is_checkpointed: bool
    """Whether activations are computed again in the backward pass."""
    steps: int | None
    """Optimizer steps, None where nothing says how many."""
    keeps_logits: bool = False
    """Whether validation computes all logits of a pass twice as large, as pretraining does."""
    can_shard: bool = False
    """Whether the command runs under FSDP."""
    episodes: Episodes | None = None

    @property
    def is_half(self) -> bool:
        """Whether products are computed in bfloat16."""
        return self.precision != "fp32"

    @property
    def tokens_per_step(self) -> float:
        """Over all devices, without padding."""
        if self.episodes is not None:
            return self.episodes.per_step * self.world * self.mean_length
        return self.batch_size * self.grad_accum * self.world * self.mean_length

    @property
    def tokens(self) -> float | None:
        """Of the whole run."""
        return None if self.steps is None else self.steps * self.tokens_per_step

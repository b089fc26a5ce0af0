"""Workload: a command's fields, hyperparameters and a model's shape in, the numbers out that memory
and time follow from, the same ones for every command.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from llmctl.config.commands.dpo import DpoConfig
from llmctl.config.commands.ppo import PpoConfig
from llmctl.config.commands.reward import RewardConfig
from llmctl.config.commands.sft import SftConfig
from llmctl.config.finetuning import LowRank, Quantized
from llmctl.models.quantized import LoadIn
from llmctl.planning.shape import ModelShape
from llmctl.ppo.hyperparameters import CPU_PASS_LOGITS, GPU_PASS_LOGITS
from llmctl.training.base_model import load_in
from llmctl.training.hyperparameters import EvaluationShare, Hyperparameters, method_of

PAIRED = ("reward", "dpo")
"""Methods whose rows have two sequences."""

FinetuningConfig = SftConfig | RewardConfig | DpoConfig


@dataclass(frozen=True)
class PpoWorkload:
    """Work of PPO beside training: sampling, and forward passes of other models."""

    episodes: int
    """Episodes of a step on one device."""
    prompt_tokens: int
    """Tokens of the longest prompt."""
    response_tokens: int
    """Most tokens of a response."""
    rollout_batch_size: int
    """Most sequences that are sampled at once."""
    epochs: int
    """Passes over the episodes of a step."""
    reward_parameters: int
    """Parameters of reward models with weights of their own."""
    max_logits: int
    """Most logits of a forward and backward pass."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A run on its devices."""

    stage: str
    shape: ModelShape
    device: str
    world: int
    """Devices."""
    precision: str
    optimizer: str
    trained: int
    """Parameters that train, of the policy in PPO."""
    has_adapter: bool = False
    load_in: LoadIn = "full"
    lora_rank: int = 0
    """0 without low-rank adapters."""
    batch_size: int
    """Sequences of a forward pass, the two sides of a pair counted."""
    grad_accum: int = 1
    length: int
    """Tokens of the longest sequence."""
    mean_length: float
    """Tokens of a sequence, without padding."""
    logit_share: float
    """Share of the positions that logits are computed of; 0 for a model that scores."""
    is_chunked: bool = False
    is_checkpointed: bool = False
    """Whether activations are computed again in the backward pass."""
    steps: int | None
    """Optimizer steps, None where nothing says how many."""
    keeps_logits: bool = False
    """Whether validation computes all logits of a pass twice as large, as pretraining does."""
    can_shard: bool = False
    """Whether the command runs under FSDP."""
    evaluation: EvaluationShare | None = None
    """None where nothing says what an evaluation reads."""
    ppo: PpoWorkload | None = None

    @property
    def is_half(self) -> bool:
        """Whether products are computed in bfloat16."""
        return self.precision != "fp32"

    @property
    def pass_tokens(self) -> int:
        """Tokens of a forward pass, padding included."""
        return self.batch_size * self.length

    @property
    def tokens_per_step(self) -> float:
        """Tokens of a step over all devices, without padding."""
        if self.ppo is not None:
            return self.ppo.episodes * self.world * self.mean_length
        return self.batch_size * self.grad_accum * self.world * self.mean_length

    @property
    def tokens(self) -> float | None:
        """Tokens of the whole run."""
        return None if self.steps is None else self.steps * self.tokens_per_step


def pretrain_workload(values: Hyperparameters, shape: ModelShape, device: str) -> Workload:
    """Workload of pretraining: every position has logits."""
    assert values.context is not None
    return Workload(
        stage="pretrain",
        shape=shape,
        device=device,
        world=values.world_size,
        precision=values.precision,
        optimizer=values.optimizer,
        trained=shape.parameters,
        batch_size=values.batch_size,
        grad_accum=values.grad_accum,
        length=values.context,
        mean_length=values.context,
        logit_share=1.0,
        steps=values.max_steps,
        keeps_logits=True,
        can_shard=True,
        evaluation=values.evaluation,
    )


def finetuning_workload(
    config: FinetuningConfig,
    values: Hyperparameters,
    shape: ModelShape,
    lengths: Sequence[int],
    trained: int,
    *,
    device: str,
    logit_share: float = 1.0,
    knows_steps: bool = True,
) -> Workload:
    """Workload of sft, reward or dpo.

    The shape is that of the model without an adapter, lengths are tokens of the rows (of pairs,
    their longer side), and steps are known where the rows are those of the run.
    """
    method = method_of(config)
    has_logits = not is_classifier(config)
    return Workload(
        stage=method,
        shape=shape,
        device=device,
        world=values.world_size,
        precision=values.precision,
        optimizer=values.optimizer,
        trained=trained,
        has_adapter=config.has_adapter,
        load_in=base_load_in(config),
        lora_rank=config.lora_r if config.is_low_rank else 0,
        batch_size=values.batch_size * (2 if method in PAIRED else 1),
        grad_accum=values.grad_accum,
        length=max(lengths),
        mean_length=sum(lengths) / len(lengths),
        logit_share=logit_share if has_logits else 0.0,
        is_chunked=has_logits and not isinstance(config, RewardConfig) and config.chunked_loss,
        is_checkpointed=config.activation_checkpointing,
        steps=values.max_steps if knows_steps else None,
        can_shard=base_load_in(config) == "full",
        evaluation=values.evaluation,
    )


def ppo_workload(
    config: PpoConfig,
    values: Hyperparameters,
    shape: ModelShape,
    prompt_lengths: Sequence[int],
    trained: int,
    reward_parameters: int,
    *,
    device: str,
    knows_steps: bool = True,
) -> Workload:
    """Workload of PPO.

    The shape is that of the policy without an adapter, lengths are in tokens, reward models count
    that have weights of their own, and steps are known where the prompts are those of the run.
    """
    ppo = values.ppo
    assert ppo is not None
    length = max(prompt_lengths) + config.max_new_tokens
    minibatch = -(-values.batch_size // ppo.minibatches)
    return Workload(
        stage="ppo",
        shape=shape,
        device=device,
        world=values.world_size,
        precision=values.precision,
        optimizer=values.optimizer,
        trained=trained,
        has_adapter=config.has_adapter,
        load_in=base_load_in(config),
        lora_rank=config.lora_r if config.is_low_rank else 0,
        batch_size=max(1, min(ppo.pass_tokens // length, minibatch)),
        length=length,
        mean_length=sum(prompt_lengths) / len(prompt_lengths) + config.max_new_tokens,
        logit_share=config.max_new_tokens / length,
        steps=values.max_steps if knows_steps else None,
        evaluation=values.evaluation,
        ppo=PpoWorkload(
            episodes=values.batch_size,
            prompt_tokens=max(prompt_lengths),
            response_tokens=config.max_new_tokens,
            rollout_batch_size=config.rollout_batch_size,
            epochs=ppo.ppo_epochs,
            reward_parameters=reward_parameters,
            max_logits=GPU_PASS_LOGITS if device == "cuda" else CPU_PASS_LOGITS,
        ),
    )


def is_classifier(config: FinetuningConfig) -> bool:
    """Whether the model gives numbers for a text, and no logits of tokens."""
    return isinstance(config, RewardConfig) or (
        isinstance(config, SftConfig) and config.task == "classify"
    )


def base_load_in(config: LowRank) -> LoadIn:
    """Precision that the frozen weights are loaded in."""
    return load_in(config) if isinstance(config, Quantized) else "full"

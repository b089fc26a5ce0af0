"""From what a stage prepares in a dry run to its outlook."""

from collections.abc import Sequence
from copy import deepcopy

from transformers import PreTrainedConfig

from llmctl import shapes
from llmctl.config.stages import DpoConfig, PpoConfig, RewardConfig, SftConfig
from llmctl.config.supervised import LowRank, Quantized
from llmctl.data.tokenized import Tokenized
from llmctl.planning.outlook import Outlook, outlook
from llmctl.planning.shape import Shape, shape_of
from llmctl.planning.work import Episodes, Work
from llmctl.ppo.hyperparameters import CPU_PASS_LOGITS, GPU_PASS_LOGITS
from llmctl.quantized import LoadIn
from llmctl.training.base_model import Prepared, load_in
from llmctl.training.hyperparameters import Hyperparameters, method_of

Tuned = SftConfig | RewardConfig | DpoConfig
PAIRED = ("reward", "dpo")


def tuning_work(
    config: Tuned,
    values: Hyperparameters,
    shape: Shape,
    lengths: Sequence[int],
    trained: int,
    *,
    device: str,
    world: int,
    counted: float = 1.0,
    knows_steps: bool = True,
) -> Work:
    """Of fine-tuning.

    Args:
        config: the command's fields.
        values: hyperparameters of the run.
        shape: of the model without an adapter.
        lengths: tokens of the rows, of pairs their longer side.
        trained: parameters that train.
        device: type of device.
        world: processes.
        counted: share of positions that are trained on.
        knows_steps: whether the rows are those of the run.
    """
    stage = method_of(config)
    has_logits = not scores(config)
    return Work(
        stage=stage,
        shape=shape,
        device=device,
        world=world,
        precision=values.precision,
        optimizer=values.optimizer,
        trained=trained,
        has_adapter=config.has_adapter,
        load_in=held_in(config),
        rank=config.lora_r if config.is_low_rank else 0,
        batch_size=values.batch_size * (2 if stage in PAIRED else 1),
        grad_accum=values.grad_accum,
        length=max(lengths),
        mean_length=sum(lengths) / len(lengths),
        counted=counted if has_logits else 0.0,
        is_chunked=has_logits and not isinstance(config, RewardConfig) and config.chunked_loss,
        is_checkpointed=config.activation_checkpointing,
        steps=values.max_steps if knows_steps else None,
        can_shard=held_in(config) == "full",
    )


def ppo_work(
    config: PpoConfig,
    values: Hyperparameters,
    shape: Shape,
    prompts: Sequence[int],
    trained: int,
    judges: int,
    *,
    device: str,
    world: int,
    knows_steps: bool = True,
) -> Work:
    """Of PPO.

    Args:
        config: the command's fields.
        values: hyperparameters of the run.
        shape: of the policy without an adapter.
        prompts: tokens of each.
        trained: parameters of the policy that train.
        judges: parameters of reward models with weights of their own.
        device: type of device.
        world: processes.
        knows_steps: whether the prompts are those of the run.
    """
    ppo = values.ppo
    assert ppo is not None
    length = max(prompts) + config.max_new_tokens
    a_pass = max(1, min(ppo.pass_tokens // length, -(-values.batch_size // ppo.minibatches)))
    return Work(
        stage="ppo",
        shape=shape,
        device=device,
        world=world,
        precision=values.precision,
        optimizer="adamw",
        trained=trained,
        has_adapter=config.has_adapter,
        load_in=held_in(config),
        rank=config.lora_r if config.is_low_rank else 0,
        batch_size=a_pass,
        grad_accum=1,
        length=length,
        mean_length=sum(prompts) / len(prompts) + config.max_new_tokens,
        counted=config.max_new_tokens / length,
        is_chunked=False,
        is_checkpointed=False,
        steps=values.max_steps if knows_steps else None,
        episodes=Episodes(
            per_step=values.batch_size,
            prompt=max(prompts),
            response=config.max_new_tokens,
            rollout=config.rollout_batch_size,
            passes=ppo.ppo_epochs,
            judges=judges,
            most_logits=GPU_PASS_LOGITS if device == "cuda" else CPU_PASS_LOGITS,
        ),
    )


def scores(config: Tuned) -> bool:
    """Whether a model is trained that gives numbers for a text, and no logits."""
    return isinstance(config, RewardConfig) or (
        isinstance(config, SftConfig) and config.task == "classify"
    )


def held_in(config: LowRank) -> LoadIn:
    """How the frozen weights are to be held."""
    return load_in(config) if isinstance(config, Quantized) else "full"


def shape_to_train(config: PreTrainedConfig, *, labels: int = 0) -> Shape:
    """The shape of a language model, or of a classifier of so many numbers."""
    if labels:
        config = deepcopy(config)
        config.num_labels = labels
    return shape_of(config, shapes.meta_model(config, scores=bool(labels)))


def counted_share(*parts: Tokenized) -> float:
    """The largest share of a sequence that is trained on."""
    return max(float((part.trained_counts / part.lengths).max()) for part in parts)


def foreseen(
    config: Tuned,
    prepared: Prepared,
    device: str,
    world: int,
    counted: float = 1.0,
) -> Outlook:
    """The outlook of a run whose model is loaded."""
    labels = prepared.model.config.num_labels if scores(config) else 0
    shape = shape_to_train(prepared.model.config, labels=labels)
    work = tuning_work(
        config,
        prepared.hyperparameters,
        shape,
        prepared.train.lengths,
        prepared.trained_parameters,
        device=device,
        world=world,
        counted=counted,
    )
    return outlook(work, prepared.model.config.get_text_config())

"""Work out what a recipe takes: it and what of its model and data is at hand in, an outlook out.

No weights are loaded. The same numbers follow from what a command prepares in a dry run, and for
pretraining from a shape alone.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from transformers import PreTrainedConfig

from llmctl import hardware
from llmctl.config.commands import (
    DpoConfig,
    PlanConfig,
    PpoConfig,
    PretrainConfig,
    RewardConfig,
    SftConfig,
)
from llmctl.config.finetuning import LowRank, Quantized
from llmctl.data.classification import load_classification_data
from llmctl.data.preference_pairs import load_pairs, load_preferences
from llmctl.data.prompts import read_prompts
from llmctl.data.sft import load_sft_data
from llmctl.data.tokenized import Tokenized
from llmctl.errors import UserError
from llmctl.models import presets
from llmctl.models.loading import context_size, load_config, load_tokenizer, parameter_count
from llmctl.models.quantized import LoadIn
from llmctl.planning.outlook import Outlook, outlook
from llmctl.planning.shape import VOCABULARY, Shape, config_of, shape_of, too_long
from llmctl.planning.work import Episodes, Work
from llmctl.ppo.hyperparameters import CPU_PASS_LOGITS, GPU_PASS_LOGITS, for_ppo
from llmctl.ppo.prompts import PromptFormat, encode_prompts
from llmctl.ppo.rewards import parse_weight
from llmctl.training.adapters import adapt, trainable_parameters
from llmctl.training.base_model import Prepared, load_in
from llmctl.training.batches import SequenceRows
from llmctl.training.hyperparameters import (
    COMPUTE_OPTIMAL,
    Hyperparameters,
    for_finetuning,
    for_pretraining,
    method_of,
    preset_for,
)
from llmctl.training.pretrain import LONGEST_CONTEXT, prepare_pretraining

PROMPT = 512
"""Tokens of a prompt likewise."""
ROWS = 1000
"""Stands for rows whose number nothing says; steps are then not known either."""

Tuned = SftConfig | RewardConfig | DpoConfig

Recipe = PretrainConfig | Tuned | PpoConfig

LONGEST = 2048
"""Tokens of a sequence where nothing says (`sft`'s own limit)."""
BYTES = 4
"""Of text that make a token, about."""

Planned = tuple[Work, PreTrainedConfig, tuple[str, ...]]

PAIRED = ("reward", "dpo")


def plan_recipe(recipe: Recipe, asked: PlanConfig, device: str) -> Planned:
    """The work that a recipe asks for, the model's configuration, and what was assumed.

    Raises:
        ModelError: the recipe's model is not at hand, or is broken.
        DataError: its data likewise.
        UserError: settings that do not go together.
    """
    wanted = recipe.precision
    absent = device == "cuda" and not torch.cuda.is_available()
    if absent:  # what this machine cannot do says nothing of the one that is planned for
        recipe = recipe.model_copy(update={"precision": "fp32"})
    match recipe:
        case PretrainConfig():
            work, config, notes = plan_pretrain(recipe, asked, device)
        case PpoConfig():
            work, config, notes = _plan_ppo(recipe, asked, device)
        case _:
            work, config, notes = _plan_tuning(recipe, asked, device)
    if absent:
        work = replace(work, precision="bf16" if wanted == "auto" else wanted)
    return work, config, notes


def _plan_tuning(recipe: Tuned, asked: PlanConfig, device: str) -> Planned:
    notes: tuple[str, ...] = ()
    config = load_config(recipe.model) if asked.shape is None else config_of(asked.shape)
    share, knows = 1.0, asked.rows is not None or recipe.max_steps is not None
    if asked.shape is None and asked.length is None:
        lengths, share, config.num_labels = _lengths(recipe)
        knows = True
    else:
        limit = recipe.max_length or min(context_size(config) or LONGEST, LONGEST)
        lengths = [asked.length or limit] * (asked.rows or ROWS)
        notes = (f"the data is not read: every sequence has {lengths[0]:,} tokens",)
    shape = shape_to_train(config, labels=config.num_labels if scores(recipe) else 0)
    notes = (*notes, *too_long(shape, asked.length or 0))
    trained = _trained(recipe, config, shape.parameters, labelled=scores(recipe))
    values = for_finetuning(
        recipe,
        parameters=shape.parameters,
        rows=len(lengths),
        world_size=asked.devices,
        device=device,
    )
    work = tuning_work(
        recipe,
        values,
        shape,
        lengths,
        trained,
        device=device,
        world=asked.devices,
        counted=share,
        knows_steps=knows,
    )
    return work, config, notes


def _lengths(recipe: Tuned) -> tuple[list[int], float, int]:
    """Tokens of each row, the largest share of one that counts, and how many labels there are."""
    if isinstance(recipe, RewardConfig):
        return load_preferences(recipe, None).train.lengths.tolist(), 0.0, 1
    if isinstance(recipe, DpoConfig):
        pairs = load_pairs(recipe, None).train
        return pairs.lengths.tolist(), counted_share(pairs.chosen, pairs.rejected), 1
    if recipe.task == "classify":
        data = load_classification_data(recipe)
        return data.train.lengths.tolist(), 0.0, len(data.labels)
    examples = load_sft_data(recipe, recipe.prompt_tuning or 0, None)
    rows = SequenceRows(examples.train, 0, examples.max_length if recipe.packing else None)
    return rows.lengths, counted_share(examples.train), 1


def _trained(
    recipe: Tuned | PpoConfig, config: PreTrainedConfig, parameters: int, *, labelled: bool = False
) -> int:
    """Parameters that train: all, or those of the adapter, which is put on a model of no weight."""
    if not recipe.has_adapter:
        return parameters
    model = presets.meta_model(config, scores=labelled)
    adapted: PeftModel = adapt(model, recipe, task="classify" if labelled else "chat")
    return trainable_parameters(adapted)[0]


def _plan_ppo(recipe: PpoConfig, asked: PlanConfig, device: str) -> Planned:
    notes: tuple[str, ...] = ()
    config = load_config(recipe.model) if asked.shape is None else config_of(asked.shape)
    shape = shape_to_train(config)
    if asked.shape is None and asked.length is None:
        prompts = _prompts(recipe, config)
    else:
        prompts = [asked.length or PROMPT] * (asked.rows or ROWS)
        notes = (f"the data is not read: every prompt has {prompts[0]:,} tokens",)
        notes = (*notes, *too_long(shape, prompts[0] + recipe.max_new_tokens))
    values = for_ppo(
        recipe,
        parameters=shape.parameters,
        prompts=len(prompts),
        world_size=asked.devices,
        device=device,
    )
    judges = _judges(recipe, shape.parameters, asked)
    if recipe.reward_model and asked.shape is not None:
        notes = (*notes, "reward models are taken to be as large as the policy")
    return (
        ppo_work(
            recipe,
            values,
            shape,
            prompts,
            _trained(recipe, config, shape.parameters),
            judges,
            device=device,
            world=asked.devices,
            knows_steps=asked.shape is None or bool(asked.rows or recipe.max_steps),
        ),
        config,
        notes,
    )


def _prompts(recipe: PpoConfig, config: PreTrainedConfig) -> Sequence[int]:
    """Tokens of each prompt."""
    read = read_prompts(recipe.data, recipe.val_data, recipe.val_size, recipe.skip_bad_rows)
    written = PromptFormat(load_tokenizer(recipe.model), recipe, None)
    asked = encode_prompts(read.train, written, config, recipe)
    if not len(asked):
        raise UserError("no prompt is left to train on", file=recipe.data[0])
    return [len(tokens) for tokens in asked.tokens]


def _judges(recipe: PpoConfig, policy: int, asked: PlanConfig) -> int:
    """Parameters of reward models; adapters on the policy's own weights count as whole models."""
    if asked.shape is not None:
        return policy * len(recipe.reward_model)
    names = [parse_weight("--reward-model", text)[0] for text in recipe.reward_model]
    models = [presets.meta_model(load_config(name), scores=True) for name in names]
    return sum(parameter_count(model) for model in models)


def pick(device: str, asked: PlanConfig) -> str:
    """The device to plan for: a GPU need not be here where its size or speed was told."""
    if device == "auto" and (asked.device_memory or asked.tflops):
        return "cuda"
    return device if device in ("cuda", "cpu") else hardware.pick_device(device)


def pretrain_work(values: Hyperparameters, shape: Shape, device: str) -> Work:
    """Of pretraining: every position has logits."""
    assert values.context is not None
    return Work(
        stage="pretrain",
        shape=shape,
        device=device,
        world=values.world_size,
        precision=values.precision,
        optimizer=values.optimizer,
        trained=shape.parameters,
        has_adapter=False,
        load_in="full",
        rank=0,
        batch_size=values.batch_size,
        grad_accum=values.grad_accum,
        length=values.context,
        mean_length=values.context,
        counted=1.0,
        is_chunked=False,
        is_checkpointed=False,
        steps=values.max_steps,
        keeps_logits=True,
        can_shard=True,
    )


def foreseen_pretrain(values: Hyperparameters, architecture: Any, device: str) -> Outlook:
    """The outlook of pretraining."""
    work = pretrain_work(values, shape_to_train(architecture), device)
    return outlook(work, architecture.get_text_config())


def plan_shape(asked: PlanConfig, device: str) -> Planned:
    """The work of pretraining a shape, in full and with AdamW.

    Raises:
        UserError: an unknown shape.
    """
    assert asked.shape is not None
    config = config_of(asked.shape)
    recipe = PretrainConfig(
        tokens=asked.shape,
        optimizer="adamw",
        precision="fp32",
        batch_size=asked.batch_size or 1,
        grad_accum=1,
        tokens_budget=asked.tokens,
    )
    work, notes = _guess(recipe, asked, config, device)
    return replace(work, precision="bf16"), config, notes


def plan_pretrain(recipe: PretrainConfig, asked: PlanConfig, device: str) -> Planned:
    """The work of a recipe, on its tokens where they are at hand."""
    folder = Path(recipe.tokens or "").expanduser()
    if asked.shape is None and recipe.tokens and (folder / "tokens").is_dir():
        setup = prepare_pretraining(recipe, folder, Accelerator(cpu=device == "cpu"), device)
        context = setup.hyperparameters.context
        assert context is not None
        values = for_pretraining(
            recipe,
            parameters=setup.parameters,
            train_tokens=setup.index.train.tokens,
            context=context,
            world_size=asked.devices,
            device=device,
            sharded=False,
        )
        work = pretrain_work(values, shape_to_train(setup.architecture), device)
        return work, setup.architecture, ()
    notes: tuple[str, ...] = ()
    if asked.shape is not None:
        config = config_of(asked.shape)
    elif recipe.model or recipe.config_from:
        config = load_config(str(recipe.model or recipe.config_from))
    else:
        preset = preset_for(asked.tokens or VOCABULARY**2, device)
        config = presets.new_config(recipe, preset, VOCABULARY, None)
        notes = (f"{recipe.tokens or 'the data'} is not read: a vocabulary of {VOCABULARY:,}",)
    work, more = _guess(recipe, asked, config, device)
    return work, config, (*notes, *more)


def guessed(
    recipe: PretrainConfig, vocabulary: int, text_bytes: int, world: int, device: str
) -> Outlook:
    """The outlook of pretraining on text that is not encoded yet.

    Args:
        recipe: the command's fields.
        vocabulary: tokens of its tokenizer.
        text_bytes: size of the text.
        world: processes.
        device: type of device.
    """
    tokens = text_bytes // BYTES
    if recipe.model:
        config = load_config(recipe.model)
    else:
        config = presets.new_config(recipe, preset_for(tokens, device), vocabulary, None)
    asked = PlanConfig(shape="corpus", devices=world)
    work, _ = _guess(recipe, asked, config, device, train_tokens=tokens)
    note = f"{BYTES} bytes of text are taken for a token"
    return outlook(work, config.get_text_config(), notes=(note,))


def _guess(
    recipe: PretrainConfig,
    asked: PlanConfig,
    config: PreTrainedConfig,
    device: str,
    train_tokens: int | None = None,
) -> tuple[Work, tuple[str, ...]]:
    """Pretraining on tokens that are not at hand, of which there may be so many."""
    shape = shape_to_train(config)
    context = asked.length or recipe.context or min(shape.context or LONGEST, LONGEST_CONTEXT)
    given = asked.tokens or recipe.tokens_budget
    tokens = given or COMPUTE_OPTIMAL * shape.parameters
    values = for_pretraining(
        recipe,
        parameters=shape.parameters,
        train_tokens=train_tokens or tokens,
        context=context,
        world_size=asked.devices,
        device=device,
        sharded=False,
    )
    steps = values.max_steps
    if train_tokens is None and recipe.max_steps is None and recipe.epochs is None:
        steps = max(1, round(tokens / values.tokens_per_step))
    work = pretrain_work(replace(values, max_steps=steps), shape, device)
    assumed = f"{COMPUTE_OPTIMAL} tokens for each parameter, since --tokens says nothing"
    says = train_tokens or given or recipe.max_steps or recipe.epochs or recipe.tokens_per_parameter
    notes = () if says else (assumed,)
    return work, (*notes, *too_long(shape, asked.length or 0))


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
    return shape_of(config, presets.meta_model(config, scores=bool(labels)))


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

"""Plan a recipe: it, its model and its data in, its workload or its outlook out.

No weights are loaded. Where model or data are not at hand, assumptions stand in, and are noted. The
outlook of a dry run follows from what its command has prepared.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from transformers import PreTrainedConfig

from llmctl import hardware
from llmctl.config.commands.dpo import DpoConfig
from llmctl.config.commands.plan import PlanConfig
from llmctl.config.commands.ppo import PpoConfig
from llmctl.config.commands.pretrain import PretrainConfig
from llmctl.config.commands.reward import RewardConfig
from llmctl.data.audit.rules import RowRules
from llmctl.data.bad_rows import BadRows
from llmctl.data.classification import load_classification_data
from llmctl.data.preference_pairs import load_dpo_data, load_reward_data
from llmctl.data.prompts import read_prompts
from llmctl.data.sft import load_sft_data
from llmctl.data.tokenized import Tokenized
from llmctl.errors import UserError
from llmctl.models import presets
from llmctl.models.loading import (
    context_size,
    load_config,
    load_tokenizer,
    parameter_count,
    trainable_parameters,
)
from llmctl.planning.outlook import Outlook, make_outlook
from llmctl.planning.shape import VOCABULARY, config_of, shape_of, too_long
from llmctl.planning.workload import (
    FinetuningConfig,
    Workload,
    finetuning_workload,
    is_classifier,
    ppo_workload,
    pretrain_workload,
)
from llmctl.ppo.encoded_prompts import PromptFormat, encode_prompts
from llmctl.ppo.hyperparameters import for_ppo
from llmctl.ppo.rewards import parse_weight
from llmctl.ppo.setup import PreparedPpo
from llmctl.training.adapters import adapt
from llmctl.training.base_model import Prepared
from llmctl.training.batches import SequenceRows
from llmctl.training.hyperparameters import (
    COMPUTE_OPTIMAL,
    Hyperparameters,
    for_finetuning,
    for_pretraining,
    preset_for,
)
from llmctl.training.pretrain import LONGEST_CONTEXT, prepare_pretraining

ROWS = 1000
"""Assumed where the number of rows is not known; steps are then not known either."""
LENGTH = 2048
"""Most tokens of a sequence where nothing says (`sft`'s own limit)."""
PROMPT_LENGTH = 512
"""Tokens of a prompt likewise."""
BYTES_PER_TOKEN = 4
"""About, in text."""

Recipe = PretrainConfig | FinetuningConfig | PpoConfig
Notes = tuple[str, ...]
Planned = tuple[Workload, PreTrainedConfig, Notes]
"""A workload, the configuration of its model, and what was assumed."""


def planning_device(device: str, options: PlanConfig) -> str:
    """Pick the device to plan for: a GPU need not be here where its size or speed is given."""
    if device == "auto" and (options.device_memory or options.tflops):
        return "cuda"
    return device if device in ("cuda", "cpu") else hardware.pick_device(device)


def plan_recipe(recipe: Recipe, options: PlanConfig, device: str) -> Planned:
    """Plan a recipe.

    Raises:
        ModelError: the recipe's model is not at hand, or is broken.
        DataError: its data likewise.
        UserError: settings that do not go together.
    """
    precision = recipe.precision
    is_absent = device == "cuda" and not torch.cuda.is_available()
    if is_absent:  # what this machine cannot do says nothing of the one that is planned for
        recipe = recipe.model_copy(update={"precision": "fp32"})
    match recipe:
        case PretrainConfig():
            workload, model_config, notes = _plan_pretrain(recipe, options, device)
        case PpoConfig():
            workload, model_config, notes = _plan_ppo(recipe, options, device)
        case _:
            workload, model_config, notes = _plan_finetuning(recipe, options, device)
    if is_absent:
        workload = replace(workload, precision="bf16" if precision == "auto" else precision)
    return workload, model_config, notes


def plan_shape(options: PlanConfig, device: str) -> Planned:
    """Plan to pretrain a shape, in full and with AdamW.

    Raises:
        UserError: an unknown shape.
    """
    assert options.shape is not None
    model_config = config_of(options.shape)
    recipe = PretrainConfig(
        tokens=options.shape,
        optimizer="adamw",
        precision="fp32",
        batch_size=options.batch_size or 1,
        grad_accum=1,
        tokens_budget=options.tokens,
    )
    workload, notes = _plan_unread_tokens(recipe, options, model_config, device)
    return replace(workload, precision="bf16"), model_config, notes


# Pretraining


def _plan_pretrain(recipe: PretrainConfig, options: PlanConfig, device: str) -> Planned:
    folder = Path(recipe.tokens or "").expanduser()
    if options.shape is None and recipe.tokens and (folder / "tokens").is_dir():
        prepared = prepare_pretraining(recipe, folder, Accelerator(cpu=device == "cpu"), device)
        context = prepared.hyperparameters.context
        assert context is not None
        values = for_pretraining(
            recipe,
            parameters=prepared.parameters,
            train_tokens=prepared.index.train.tokens,
            context=context,
            world_size=options.devices,
            device=device,
            sharded=False,
        )
        workload = pretrain_workload(values, shape_of(prepared.architecture), device)
        return workload, prepared.architecture, ()
    notes: Notes = ()
    if options.shape is not None:
        model_config = config_of(options.shape)
    elif recipe.model or recipe.config_from:
        model_config = load_config(str(recipe.model or recipe.config_from))
    else:
        preset = preset_for(options.tokens or VOCABULARY**2, device)
        model_config = presets.new_config(recipe, preset, VOCABULARY, None)
        notes = (f"{recipe.tokens or 'the data'} is not read: a vocabulary of {VOCABULARY:,}",)
    workload, more = _plan_unread_tokens(recipe, options, model_config, device)
    return workload, model_config, (*notes, *more)


def _plan_unread_tokens(
    recipe: PretrainConfig,
    options: PlanConfig,
    model_config: PreTrainedConfig,
    device: str,
    train_tokens: int | None = None,
) -> tuple[Workload, Notes]:
    """Plan pretraining on tokens that are not at hand, whose number may be known."""
    shape = shape_of(model_config)
    context = options.length or recipe.context or min(shape.context or LENGTH, LONGEST_CONTEXT)
    budget = options.tokens or recipe.tokens_budget
    tokens = budget or COMPUTE_OPTIMAL * shape.parameters
    values = for_pretraining(
        recipe,
        parameters=shape.parameters,
        train_tokens=train_tokens or tokens,
        context=context,
        world_size=options.devices,
        device=device,
        sharded=False,
    )
    steps = values.max_steps
    if train_tokens is None and recipe.max_steps is None and recipe.epochs is None:
        steps = max(1, round(tokens / values.tokens_per_step))
    workload = pretrain_workload(replace(values, max_steps=steps), shape, device)
    is_known = train_tokens or budget or recipe.max_steps or recipe.epochs
    assumed = f"{COMPUTE_OPTIMAL} tokens for each parameter, since --tokens says nothing"
    notes = () if is_known or recipe.tokens_per_parameter else (assumed,)
    return workload, (*notes, *too_long(shape, options.length or 0))


# Fine-tuning


def _plan_finetuning(recipe: FinetuningConfig, options: PlanConfig, device: str) -> Planned:
    notes: Notes = ()
    model_config = _model_config(recipe, options)
    logit_share, knows_steps = 1.0, options.rows is not None or recipe.max_steps is not None
    if options.shape is None and options.length is None:
        lengths, logit_share, model_config.num_labels = _read_lengths(recipe)
        knows_steps = True
    else:
        limit = recipe.max_length or min(context_size(model_config) or LENGTH, LENGTH)
        lengths = [options.length or limit] * (options.rows or ROWS)
        notes = (f"the data is not read: every sequence has {lengths[0]:,} tokens",)
    labels = model_config.num_labels if is_classifier(recipe) else 0
    shape = shape_of(model_config, labels=labels)
    values = for_finetuning(
        recipe,
        parameters=shape.parameters,
        rows=len(lengths),
        world_size=options.devices,
        device=device,
    )
    workload = finetuning_workload(
        recipe,
        values,
        shape,
        lengths,
        _trained_parameters(recipe, model_config, shape.parameters, labels=labels),
        device=device,
        logit_share=logit_share,
        knows_steps=knows_steps,
    )
    return workload, model_config, (*notes, *too_long(shape, options.length or 0))


def _model_config(recipe: FinetuningConfig | PpoConfig, options: PlanConfig) -> PreTrainedConfig:
    return load_config(recipe.model) if options.shape is None else config_of(options.shape)


def _read_lengths(recipe: FinetuningConfig) -> tuple[list[int], float, int]:
    """Tokens of each row, the largest share of one that is trained on, and the number of labels."""
    if isinstance(recipe, RewardConfig):
        return load_reward_data(recipe, None).train.lengths.tolist(), 0.0, 1
    if isinstance(recipe, DpoConfig):
        pairs = load_dpo_data(recipe, None).train
        return pairs.lengths.tolist(), trained_share(pairs.chosen, pairs.rejected), 1
    if recipe.task == "classify":
        data = load_classification_data(recipe)
        return data.train.lengths.tolist(), 0.0, len(data.labels)
    examples = load_sft_data(recipe, recipe.prompt_tuning or 0, None)
    rows = SequenceRows(examples.train, 0, examples.max_length if recipe.packing else None)
    return rows.lengths, trained_share(examples.train), 1


def trained_share(*tokenized: Tokenized) -> float:
    """Largest share of a sequence that is trained on."""
    return max(float((part.trained_counts / part.lengths).max()) for part in tokenized)


def _trained_parameters(
    recipe: FinetuningConfig | PpoConfig,
    model_config: PreTrainedConfig,
    parameters: int,
    *,
    labels: int = 0,
) -> int:
    """Parameters that train: all, or those of the adapter, put on a model without weights."""
    if not recipe.has_adapter:
        return parameters
    model = presets.meta_model(model_config, scores=bool(labels))
    adapted: PeftModel = adapt(model, recipe, task="classify" if labels else "chat")
    return trainable_parameters(adapted)[0]


# PPO


def _plan_ppo(recipe: PpoConfig, options: PlanConfig, device: str) -> Planned:
    notes: Notes = ()
    model_config = _model_config(recipe, options)
    shape = shape_of(model_config)
    if options.shape is None and options.length is None:
        bad = BadRows(recipe.skip_bad_rows)
        rows = read_prompts(recipe.data, recipe.val_data, recipe.val_size, bad)
        tokenizer = load_tokenizer(recipe.model)
        prompt_format, rules = PromptFormat(tokenizer, recipe, None), RowRules(tokenizer)
        prompts = encode_prompts(rows.train, prompt_format, model_config, recipe, bad, rules)
        if not len(prompts):
            raise UserError("no prompt is left to train on", file=recipe.data[0])
        lengths = [len(tokens) for tokens in prompts.tokens]
    else:
        lengths = [options.length or PROMPT_LENGTH] * (options.rows or ROWS)
        notes = (f"the data is not read: every prompt has {lengths[0]:,} tokens",)
        notes = (*notes, *too_long(shape, lengths[0] + recipe.max_new_tokens))
    if recipe.reward_model and options.shape is not None:
        notes = (*notes, "reward models are taken to be as large as the policy")
    values = for_ppo(
        recipe,
        parameters=shape.parameters,
        prompts=len(lengths),
        world_size=options.devices,
        device=device,
    )
    workload = ppo_workload(
        recipe,
        values,
        shape,
        lengths,
        _trained_parameters(recipe, model_config, shape.parameters),
        _reward_parameters(recipe, shape.parameters, options),
        device=device,
        knows_steps=options.shape is None or bool(options.rows or recipe.max_steps),
    )
    return workload, model_config, notes


def _reward_parameters(recipe: PpoConfig, policy: int, options: PlanConfig) -> int:
    """Parameters of reward models; adapters on the policy's own weights count as whole models."""
    if options.shape is not None:
        return policy * len(recipe.reward_model)
    names = [parse_weight("--reward-model", text)[0] for text in recipe.reward_model]
    models = [presets.meta_model(load_config(name), scores=True) for name in names]
    return sum(parameter_count(model) for model in models)


# Outlooks of dry runs


def pretrain_outlook(values: Hyperparameters, architecture: Any, device: str) -> Outlook:
    """Outlook of pretraining on tokens."""
    return make_outlook(pretrain_workload(values, shape_of(architecture), device), architecture)


def corpus_outlook(
    recipe: PretrainConfig, vocabulary: int, text_bytes: int, world: int, device: str
) -> Outlook:
    """Outlook of pretraining in `world` processes on text that is not tokenized yet."""
    tokens = text_bytes // BYTES_PER_TOKEN
    if recipe.model:
        model_config = load_config(recipe.model)
    else:
        model_config = presets.new_config(recipe, preset_for(tokens, device), vocabulary, None)
    options = PlanConfig(shape="corpus", devices=world)
    workload, _ = _plan_unread_tokens(recipe, options, model_config, device, train_tokens=tokens)
    note = f"{BYTES_PER_TOKEN} bytes of text are taken for a token"
    return make_outlook(workload, model_config, notes=(note,))


def finetuning_outlook(
    config: FinetuningConfig,
    prepared: Prepared,
    device: str,
    logit_share: float = 1.0,
) -> Outlook:
    """Outlook of sft, reward or dpo."""
    model_config = prepared.model.config
    labels = model_config.num_labels if is_classifier(config) else 0
    workload = finetuning_workload(
        config,
        prepared.hyperparameters,
        shape_of(model_config, labels=labels),
        prepared.train.lengths,
        prepared.trained_parameters,
        device=device,
        logit_share=logit_share,
    )
    return make_outlook(workload, model_config)


def ppo_outlook(config: PpoConfig, prepared: PreparedPpo, device: str) -> Outlook:
    """Outlook of PPO."""
    model_config = prepared.models.actor_critic.policy.config
    unshared = [source.model for source in prepared.models.reward_models if not source.is_shared]
    workload = ppo_workload(
        config,
        prepared.hyperparameters,
        shape_of(model_config),
        [len(tokens) for tokens in prepared.prompts.tokens],
        prepared.trained_parameters,
        sum(parameter_count(reward_model.model) for reward_model in unshared),
        device=device,
    )
    return make_outlook(workload, model_config)

"""A recipe and what of its model and data is at hand in, an outlook out; no weights are loaded."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from peft import PeftModel
from transformers import PreTrainedConfig

from llmctl import hardware, shapes
from llmctl.config.stages import (
    DpoConfig,
    PlanConfig,
    PpoConfig,
    PretrainConfig,
    RewardConfig,
)
from llmctl.data.dpo import load_pairs
from llmctl.data.labelled import load_labelled
from llmctl.data.preferred import load_preferences
from llmctl.data.prompts import read_prompts
from llmctl.data.supervised import load_supervised
from llmctl.decode.loop import context_size
from llmctl.errors import UserError
from llmctl.models import load_config, load_tokenizer, parameter_count
from llmctl.planning.found import (
    Tuned,
    counted_share,
    ppo_work,
    scores,
    shape_to_train,
    tuning_work,
)
from llmctl.planning.known import config_of
from llmctl.planning.pretraining import LONGEST, Planned, plan_pretrain
from llmctl.planning.shape import too_long
from llmctl.ppo.hyperparameters import for_ppo
from llmctl.ppo.prompts import PromptFormat, encode_prompts
from llmctl.ppo.rewards import weighted
from llmctl.training.adapters import adapt, trainable_parameters
from llmctl.training.batches import Sequences
from llmctl.training.hyperparameters import for_finetuning

PROMPT = 512
"""Tokens of a prompt likewise."""
ROWS = 1000
"""Stands for rows whose number nothing says; steps are then not known either."""

Recipe = PretrainConfig | Tuned | PpoConfig


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
        data = load_labelled(recipe)
        return data.train.lengths.tolist(), 0.0, len(data.labels)
    examples = load_supervised(recipe, recipe.prompt_tuning or 0, None)
    rows = Sequences(examples.train, 0, examples.max_length if recipe.packing else None)
    return rows.lengths, counted_share(examples.train), 1


def _trained(
    recipe: Tuned | PpoConfig, config: PreTrainedConfig, parameters: int, *, labelled: bool = False
) -> int:
    """Parameters that train: all, or those of the adapter, which is put on a model of no weight."""
    if not recipe.has_adapter:
        return parameters
    model = shapes.meta_model(config, scores=labelled)
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
    names = [weighted("--reward-model", text)[0] for text in recipe.reward_model]
    models = [shapes.meta_model(load_config(name), scores=True) for name in names]
    return sum(parameter_count(model) for model in models)


def pick(device: str, asked: PlanConfig) -> str:
    """The device to plan for: a GPU need not be here where its size or speed was told."""
    if device == "auto" and (asked.device_memory or asked.tflops):
        return "cuda"
    return device if device in ("cuda", "cpu") else hardware.pick_device(device)

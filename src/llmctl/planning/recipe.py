"""A recipe and what of its model and data is at hand in, an outlook out; no weights are loaded."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import PeftModel
from transformers import PreTrainedConfig

from llmctl import hardware, shapes
from llmctl.config.stages import (
    DpoConfig,
    PlanConfig,
    PpoConfig,
    PretrainConfig,
    RewardConfig,
    SftConfig,
)
from llmctl.data.dpo import load_pairs
from llmctl.data.labelled import load_labelled
from llmctl.data.preferred import load_preferences
from llmctl.data.prompts import read_prompts
from llmctl.data.supervised import load_supervised
from llmctl.errors import UserError
from llmctl.models import load_config, load_tokenizer, parameter_count
from llmctl.planning.found import (
    Tuned,
    counted_share,
    ppo_work,
    pretrain_work,
    shape_to_train,
    tuning_work,
)
from llmctl.planning.known import VOCABULARY, config_of
from llmctl.planning.outlook import Outlook, outlook
from llmctl.planning.work import Work
from llmctl.ppo.plan import make_ppo_plan
from llmctl.ppo.prompts import PromptFormat, encode_prompts
from llmctl.ppo.rewards import weighted
from llmctl.training.adapters import adapt, trainable_parameters
from llmctl.training.plan import COMPUTE_OPTIMAL, make_plan, preset_for
from llmctl.training.sequences import Rows
from llmctl.training.setup import LONGEST_CONTEXT, prepare
from llmctl.training.tuning import make_tuning_plan

LONGEST = 2048
"""Tokens of an example where neither the recipe nor its data says (`sft`'s own limit)."""
PROMPT = 512
"""Tokens of a prompt likewise."""
ROWS = 1000
"""Stands for rows whose number nothing says; steps are then not known either."""

BYTES = 4
"""Of text that make a token, about."""

Recipe = PretrainConfig | Tuned | PpoConfig
Planned = tuple[Work, PreTrainedConfig, tuple[str, ...]]


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
            work, config, notes = _plan_pretrain(recipe, asked, device)
        case PpoConfig():
            work, config, notes = _plan_ppo(recipe, asked, device)
        case _:
            work, config, notes = _plan_tuning(recipe, asked, device)
    if absent:
        work = replace(work, precision="bf16" if wanted == "auto" else wanted)
    return work, config, notes


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


def _plan_pretrain(recipe: PretrainConfig, asked: PlanConfig, device: str) -> Planned:
    folder = Path(recipe.tokens or "").expanduser()
    if asked.shape is None and recipe.tokens and (folder / "tokens").is_dir():
        setup = prepare(recipe, folder, Accelerator(cpu=device == "cpu"), device)
        work = pretrain_work(setup.plan, shape_to_train(setup.architecture), device)
        return replace(work, world=asked.devices), setup.architecture, ()
    notes: tuple[str, ...] = ()
    if asked.shape is not None:
        config = config_of(asked.shape)
    elif recipe.model or recipe.config_from:
        config = load_config(str(recipe.model or recipe.config_from))
    else:
        preset = preset_for(asked.tokens or VOCABULARY**2, device)
        config = shapes.new_config(recipe, preset, VOCABULARY, None)
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
        config = shapes.new_config(recipe, preset_for(tokens, device), vocabulary, None)
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
    plan = make_plan(
        recipe,
        parameters=shape.parameters,
        train_tokens=train_tokens or tokens,
        context=context,
        world_size=asked.devices,
        device=device,
        sharded=False,
    )
    steps = plan.max_steps
    if train_tokens is None and recipe.max_steps is None and recipe.epochs is None:
        steps = max(1, round(tokens / plan.tokens_per_step))
    work = pretrain_work(replace(plan, max_steps=steps), shape, device)
    if asked.batch_size is not None:
        work = replace(work, batch_size=asked.batch_size)
    assumed = f"{COMPUTE_OPTIMAL} tokens for each parameter, since --tokens says nothing"
    says = train_tokens or given or recipe.max_steps or recipe.epochs or recipe.tokens_per_parameter
    return work, () if says else (assumed,)


def _plan_tuning(recipe: Tuned, asked: PlanConfig, device: str) -> Planned:
    notes: tuple[str, ...] = ()
    config = load_config(recipe.model) if asked.shape is None else config_of(asked.shape)
    scores = isinstance(recipe, RewardConfig) or (
        isinstance(recipe, SftConfig) and recipe.task == "classify"
    )
    shape = shape_to_train(config, scores=scores)
    share, knows = 1.0, asked.rows is not None or recipe.max_steps is not None
    if asked.shape is None and asked.length is None:
        lengths, share = _lengths(recipe)
        knows = True
    else:
        limit = recipe.max_length or min(shape.context or LONGEST, LONGEST)
        lengths = [asked.length or limit] * (asked.rows or ROWS)
        notes = (f"the data is not read: every sequence has {lengths[0]:,} tokens",)
    trained = _trained(recipe, config, shape.parameters, scores=scores)
    plan = make_tuning_plan(
        recipe,
        parameters=shape.parameters,
        rows=len(lengths),
        world=asked.devices,
        device=device,
        **({} if isinstance(recipe, SftConfig) else {"epochs": 1}),
    )
    work = tuning_work(
        recipe,
        plan,
        shape,
        lengths,
        trained,
        device=device,
        world=asked.devices,
        counted=share,
        knows_steps=knows,
    )
    return work, config, notes


def _lengths(recipe: Tuned) -> tuple[list[int], float]:
    """Tokens of each row, and the largest share of one that counts."""
    if isinstance(recipe, RewardConfig):
        return load_preferences(recipe, None).train.lengths.tolist(), 0.0
    if isinstance(recipe, DpoConfig):
        pairs = load_pairs(recipe, None).train
        return pairs.lengths.tolist(), counted_share(pairs.chosen, pairs.rejected)
    if recipe.task == "classify":
        return load_labelled(recipe).train.lengths.tolist(), 0.0
    data = load_supervised(recipe, recipe.prompt_tuning or 0, None)
    rows = Rows(data.train, 0, data.max_length if recipe.packing else None)
    return rows.lengths, counted_share(data.train)


def _trained(
    recipe: Tuned | PpoConfig, config: PreTrainedConfig, parameters: int, *, scores: bool
) -> int:
    """Parameters that train: all, or those of the adapter, which is put on a model of no weight."""
    if not recipe.has_adapter:
        return parameters
    model = shapes.meta_model(config, scores=scores)
    adapted: PeftModel = adapt(model, recipe, task="classify" if scores else "chat")
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
    plan = make_ppo_plan(
        recipe,
        parameters=shape.parameters,
        prompts=len(prompts),
        world=asked.devices,
        device=device,
    )
    judges = _judges(recipe, shape.parameters, asked)
    if recipe.reward_model and asked.shape is not None:
        notes = (*notes, "reward models are taken to be as large as the policy")
    return (
        ppo_work(
            recipe,
            plan,
            shape,
            prompts,
            _trained(recipe, config, shape.parameters, scores=False),
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

"""Pretraining: a recipe, or a shape alone, and the tokens that are at hand in, its work out."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedConfig

from llmctl import shapes
from llmctl.config.stages import PlanConfig, PretrainConfig
from llmctl.models import load_config
from llmctl.planning.found import shape_to_train
from llmctl.planning.known import VOCABULARY, config_of
from llmctl.planning.outlook import Outlook, outlook
from llmctl.planning.shape import Shape, too_long
from llmctl.planning.work import Work
from llmctl.training.hyperparameters import (
    COMPUTE_OPTIMAL,
    Hyperparameters,
    for_pretraining,
    preset_for,
)
from llmctl.training.pretrain import LONGEST_CONTEXT, prepare

LONGEST = 2048
"""Tokens of a sequence where nothing says (`sft`'s own limit)."""
BYTES = 4
"""Of text that make a token, about."""

Planned = tuple[Work, PreTrainedConfig, tuple[str, ...]]


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
        setup = prepare(recipe, folder, Accelerator(cpu=device == "cpu"), device)
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

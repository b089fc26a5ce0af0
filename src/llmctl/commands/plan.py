"""`llmctl plan`: a recipe or a shape in, what a run of it takes on stdout out."""

import sys
from pathlib import Path
from typing import Any

from llmctl import hardware
from llmctl.config.base import read_recipe
from llmctl.config.commands import config_of
from llmctl.config.commands.plan import PlanConfig
from llmctl.config.commands.pretrain import PretrainConfig
from llmctl.errors import UserError
from llmctl.metrics import TRAINING
from llmctl.planning.compute import measure_rate
from llmctl.planning.outlook import make_outlook, outlook_lines, print_lines
from llmctl.planning.recipe import Recipe, plan_recipe, plan_shape, planning_device


def run(config: PlanConfig) -> dict[str, Any] | None:
    """Print the outlook; with --json it is the result."""
    if config.file is None:
        device = planning_device(config.device, config)
        workload, model_config, notes = plan_shape(config, device)
    else:
        recipe = _read(config.file, config.batch_size)
        _require_used(config, recipe)
        wanted = recipe.device if config.device == "auto" else config.device
        device = planning_device(wanted, config)
        hardware.set_threads(recipe.threads)
        workload, model_config, notes = plan_recipe(recipe, config, device)
    outlook = make_outlook(
        workload,
        model_config,
        capacity=config.device_memory,
        tflops=config.tflops,
        tokens_per_second=config.tokens_per_second,
        rate=measure_rate(workload, model_config) if config.measure else None,
        notes=notes,
    )
    if config.as_json:
        return {"stage": "plan", **outlook.as_json(), "of": workload.stage}
    print_lines(outlook_lines(outlook), sys.stdout)
    return None


def _require_used(config: PlanConfig, recipe: Recipe) -> None:
    """Refuse flags that would change nothing in this plan.

    Raises:
        UserError: such a flag.
    """
    pretrains = isinstance(recipe, PretrainConfig)
    if config.tokens and not pretrains:
        hint = "--rows says how many examples there are"
        raise UserError("--tokens is of pretraining", hint=hint)
    if config.rows and pretrains:
        hint = "--tokens says how much there is to pretrain on"
        raise UserError("--rows is of examples", hint=hint)
    if config.rows and config.shape is None and config.length is None:
        hint = "with --length it is not read"
        raise UserError("--rows: the data is read, and has rows of its own", hint=hint)


def _read(path: Path, batch_size: int | None) -> Recipe:
    """Read the config of a recipe that trains.

    Raises:
        UserError: it is of no such command, or malformed.
    """
    values, places = read_recipe(path)
    stage = values.get("stage")
    if "stages" in values:
        raise UserError(
            "a recipe of several stages, and plans are of one that trains",
            file=path,
            line=places.get("stages"),
            hint=f"see: llmctl run {path} --dry-run, and the recipe.yaml of each of its runs",
        )
    if stage not in TRAINING:
        what = f"a recipe of `{stage}`" if stage else "a recipe without `stage`"
        raise UserError(
            f"{what}, and plans are of commands that train: {', '.join(TRAINING)}",
            file=path,
            line=places.get("stage"),
            hint="add `stage: sft`, or whichever it is of" if not stage else None,
        )
    flags = {} if batch_size is None else {"batch_size": batch_size}
    config_class = config_of(stage)
    assert config_class is not None
    return config_class.load(stage, path, flags)  # type: ignore[return-value]

"""`llmctl run`: a recipe in, a run of each of its stages out, in order, each on those before it."""

import os
from pathlib import Path
from typing import Any

from llmctl.config.commands import RunConfig
from llmctl.config.sections import Stages
from llmctl.errors import UserError
from llmctl.pipeline.dry_run import print_plan
from llmctl.pipeline.references import expanded, resolve
from llmctl.pipeline.runner import Cycle
from llmctl.pipeline.steps import Recipe, load


def run(config: RunConfig) -> dict[str, Any] | None:
    """Run what has changed, and say how every stage stands; None after a dry run."""
    return live(load(config.recipe_path), config, "run")


def live(recipe: Recipe, config: Stages, command: str) -> dict[str, Any] | None:
    """Run a life cycle.

    Args:
        recipe: its stages.
        config: which of them, and how.
        command: what the result says it is of.

    Raises:
        GateError: a stage's figures are not what the recipe demands.
        UserError: what is wrong with the recipe, or with a stage.
    """
    if "RANK" in os.environ:
        raise UserError(
            "a life cycle is run by one process, and this one was launched with others",
            hint="run it without a launcher; `processes: N` in a stage starts N for that stage",
        )
    out = config.out or _out_of(recipe)
    stages = resolve(recipe, out, seed=config.seed, threads=config.threads)
    names = [stage.name for stage in stages]
    for flag, name in (("--from", config.from_stage), ("--only", config.only)):
        if name is not None and name not in names:
            raise UserError(f"{flag} {name}: no such stage", hint=f"stages are {', '.join(names)}")
    cycle = Cycle(stages, out, recipe.file, config, command)
    if config.dry_run or cycle.has_work():
        from llmctl.pipeline.check import check  # transformers, not needed where nothing is to do

        check(cycle.to_check(), deep=config.dry_run)
    if config.dry_run:
        print_plan(cycle, as_json=config.as_json)
        return None
    return cycle.run()


def _out_of(recipe: Recipe) -> Path:
    if recipe.out is None:
        return Path("runs") / recipe.file.stem
    return Path(expanded(recipe.out, where="out", file=recipe.file, line=None))

"""`llmctl run`: a recipe in, a run of each of its stages out, in order, each on those before it."""

import json
from pathlib import Path
from typing import Any

from llmctl.config.base import to_yaml
from llmctl.config.commands.run import RunConfig
from llmctl.config.sections import Stages
from llmctl.console import log
from llmctl.errors import UserError
from llmctl.pipeline.references import expand_variables, resolve
from llmctl.pipeline.runner import ACTION_TEXTS, PipelineRunner
from llmctl.pipeline.status import read_status
from llmctl.pipeline.steps import Recipe, load
from llmctl.redact import redacted


def run(config: RunConfig) -> dict[str, Any] | None:
    """Run what has changed, and return the state of every stage; None after a dry run."""
    return run_life_cycle(load(config.recipe_path), config, "run")


def run_life_cycle(recipe: Recipe, config: Stages, command: str) -> dict[str, Any] | None:
    """Run those stages of a life cycle that the config asks for; the result names the command.

    Raises:
        GateError: a stage's result fails a gate.
        UserError: the recipe is wrong, or a stage fails.
    """
    out = config.out or Path("runs") / recipe.file.stem
    if config.out is None and recipe.out is not None:
        out = Path(expand_variables(recipe.out, where="out", file=recipe.file, line=None))
    stages = resolve(recipe, out, seed=config.seed, threads=config.threads)
    names = [stage.name for stage in stages]
    for flag, name in (("--from", config.from_stage), ("--only", config.only)):
        if name is not None and name not in names:
            raise UserError(f"{flag} {name}: no such stage", hint=f"stages are {', '.join(names)}")
    runner = PipelineRunner(stages, out, recipe.file, config, command)
    if config.dry_run or runner.has_work():
        from llmctl.pipeline.check import check  # transformers, not needed where nothing is to do

        check(runner.to_check(), deep=config.dry_run)
    if config.dry_run:
        print_plan(runner, as_json=config.as_json)
        return None
    return runner.run()


def print_plan(runner: PipelineRunner, *, as_json: bool) -> None:
    """Print the resolved stages on stdout, and what would be done on stderr.

    Raises:
        OutputError: a directory that holds something else, or a stage that is not complete.
    """
    stages: list[dict[str, Any]] = []
    for stage, action in runner.actions(read_status(runner.out)):
        how = "left as it is" if action is None else ACTION_TEXTS[action]
        log.info("  %-16s %-10s %s", stage.name, stage.stage, how)
        recipe = stage.config.recipe(stage.stage)
        values = {key: value for key, value in recipe.items() if key in stage.config.given()}
        for field, texts in stage.references.items():  # names, so that it is a recipe again
            values[field] = list(texts) if isinstance(values[field], list) else texts[0]
        gates = {gate.figure: f"{gate.sign}{gate.bound:g}" for gate in stage.gates}
        more = {"gates": gates} if gates else {}
        stages.append({"name": stage.name, "stage": stage.stage, **values, **more})
    plan = {"out": str(runner.out), "stages": redacted(stages)}
    print(json.dumps(plan) if as_json else to_yaml(plan), end="\n" if as_json else "")

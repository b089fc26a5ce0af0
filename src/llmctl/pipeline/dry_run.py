"""What a dry run prints: the resolved stages on stdout, what would be done on stderr."""

import json
from typing import Any

from llmctl.config.base import to_yaml
from llmctl.console import log
from llmctl.pipeline.runner import HOW, Cycle
from llmctl.pipeline.status import read_journal
from llmctl.redact import redacted


def print_plan(cycle: Cycle, *, as_json: bool) -> None:
    """Print it.

    Raises:
        OutputError: a directory that holds something else, or a stage that is not complete.
    """
    stages: list[dict[str, Any]] = []
    for stage, what in cycle.todos(read_journal(cycle.out)):
        how = "left as it is" if what is None else HOW[what]
        log.info("  %-16s %-10s %s", stage.name, stage.stage, how)
        recipe = stage.config.recipe(stage.stage)
        given = {key: value for key, value in recipe.items() if key in stage.config.given()}
        for field, texts in stage.spelled.items():  # names, so that it is a recipe again
            given[field] = list(texts) if isinstance(given[field], list) else texts[0]
        gates = {gate.figure: f"{gate.sign}{gate.bound:g}" for gate in stage.gates}
        more = {"gates": gates} if gates else {}
        stages.append({"name": stage.name, "stage": stage.stage, **given, **more})
    plan = {"out": str(cycle.out), "stages": redacted(stages)}
    print(json.dumps(plan) if as_json else to_yaml(plan), end="\n" if as_json else "")

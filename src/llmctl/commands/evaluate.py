"""`llmctl evaluate`: a model, or two, and data in; rows, figures and what holds of them out."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llmctl.config.commands import EvaluateConfig
from llmctl.console import is_terminal, log, show_recipes
from llmctl.errors import GateError
from llmctl.evaluate.evaluation import PreparedEvaluation, evaluate, prepare, require_same_identity
from llmctl.evaluate.task import open_row_log
from llmctl.evaluate.figures import check_gates
from llmctl.evaluate.figures import figures_in, gated, show_table
from llmctl.runs.directory import Run, now, open_run


def run(config: EvaluateConfig) -> dict[str, Any] | None:
    """Measure and return every figure; without `--out` they are all there is."""
    if config.dry_run:
        found = prepare(config, None)
        log.info(_planned(found))
        return show_recipes([("evaluate", config)], as_json=config.as_json)
    with _opened(config) as place:
        clock = None if place is None else str(place.manifest.get("clock") or now())
        found = prepare(config, clock)
        if place is not None:
            require_same_identity(place.manifest.get("identity"), found.identity)
            place.record(inputs=found.inputs, identity=found.identity, clock=clock)
        with open_row_log(place) as rows:
            if place is not None:
                place.drop_metrics_after(len(rows.rows))
            figures = evaluate(found, rows, place)
        result = {"stage": "evaluate", "out": str(config.out), "model": config.model}
        result |= {"status": "completed", **figures}
        _settle(config, place, result)
    if config.out is not None or config.as_json:
        return result if config.out is not None else _without(result, "out")
    if is_terminal() and sys.stdout.isatty() and log.isEnabledFor(logging.INFO):
        return None  # the table is in sight
    for name, value in figures_in(result).items():
        print(name, f"{value:.6g}" if isinstance(value, float) else value)
    return None


@contextmanager
def _opened(config: EvaluateConfig) -> Iterator[Run | None]:
    """The run's directory, where one is wanted."""
    if config.out is None:
        yield None
        return
    with open_run("evaluate", config) as run:
        yield run


def _settle(config: EvaluateConfig, place: Run | None, result: dict[str, Any]) -> None:
    """Show and record the result, and see that what must hold does.

    Raises:
        GateError: it does not.
    """
    show_table(result)
    if place is not None:
        place.log(figures_in(result))
    try:
        check_gates(config.require, gated(result))
    except GateError as error:
        failed = {**result, "status": "failed"}
        error.report = failed if place is not None else _without(failed, "out")
        if place is not None:
            place.record(result=failed)
        raise
    if place is not None:
        place.record(result=result)


def _planned(found: PreparedEvaluation) -> str:
    plan = found.plan
    if plan is None:
        return f"would run {', '.join(found.config.tasks)} on {found.device}"
    rows = len(plan.data.documents[: found.config.limit] or plan.asked)
    what = ", ".join(plan.metrics)
    return f"would measure {what} on {rows:,} rows ({plan.data.kind}), on {found.device}"


def _without(result: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key != name}

"""`llmctl evaluate`: a model, or two, and data in; rows, figures and checked gates out."""

import logging
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from llmctl.config.commands.evaluate import EvaluateConfig
from llmctl.console import is_terminal, log, show_recipe
from llmctl.errors import GateError
from llmctl.evaluate.evaluation import evaluate, prepare, require_same_identity
from llmctl.evaluate.figures import check_gates, figures_in, show_table
from llmctl.evaluate.task import open_row_log
from llmctl.numbers import counted
from llmctl.runs.directory import Run, now, open_run


def run(config: EvaluateConfig) -> dict[str, Any] | None:
    """Evaluate, and return every figure; without `--out` they are the only output."""
    if config.dry_run:
        planned = prepare(config, None)
        if planned.plan is None:
            log.info("would run %s on %s", ", ".join(config.tasks), planned.device)
        else:
            data, metrics = planned.plan.data, ", ".join(planned.plan.metrics)
            count = len(planned.plan.prompts or data.documents[: config.limit])
            what = f"{metrics} on {counted(count, 'row')} ({data.kind})"
            log.info("would measure %s, on %s", what, planned.device)
        return show_recipe("evaluate", config)
    opened: AbstractContextManager[Run | None] = nullcontext()
    if config.out is not None:
        opened = open_run("evaluate", config)
    with opened as run:
        clock = None if run is None else str(run.manifest.get("clock") or now())
        prepared = prepare(config, clock)
        if run is not None:
            require_same_identity(run.manifest.get("identity"), prepared.identity)
            run.record(inputs=prepared.inputs, identity=prepared.identity, clock=clock)
        with open_row_log(run) as rows:
            if run is not None:
                run.drop_metrics_after(len(rows.rows))
            figures = evaluate(prepared, rows, run)
        out = {} if config.out is None else {"out": str(config.out)}
        result = {"stage": "evaluate", **out, "model": config.model}
        result |= {"status": "completed", **figures}
        _finish(config, run, result)
    if config.out is not None or config.as_json:
        return result
    if is_terminal() and sys.stdout.isatty() and log.isEnabledFor(logging.INFO):
        return None  # the table is in sight
    for name, value in figures_in(result).items():
        print(name, f"{value:.6g}" if isinstance(value, float) else value)
    return None


def _finish(config: EvaluateConfig, run: Run | None, result: dict[str, Any]) -> None:
    """Show and record the result, and check the gates.

    Raises:
        GateError: one does not hold.
    """
    show_table(result)
    if run is not None:
        run.log(figures_in(result))
    try:
        check_gates(config.require, result)
    except GateError as error:
        error.report = {**result, "status": "failed"}
        if run is not None:
            run.record(result=error.report)
        raise
    if run is not None:
        run.record(result=result)

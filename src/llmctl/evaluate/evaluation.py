"""An evaluation from end to end: what is planned, done on one model or two, and summed up."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from llmctl import hardware
from llmctl.config.commands import EvaluateConfig
from llmctl.decode.loop import load_to_write
from llmctl.errors import ModelError
from llmctl.evaluate.aggregate import Row, figure_names, compute_figures, quotient_names
from llmctl.evaluate.benchmarks import benchmark_task, find_tasks, task_figures, task_values
from llmctl.evaluate.classification_task import classification_task, load_evaluated_classifier
from llmctl.evaluate.compare import difference, differences, pair_rows, win_rate
from llmctl.evaluate.generation_task import generation_task
from llmctl.evaluate.task import RowLog
from llmctl.evaluate.perplexity import perplexity_task
from llmctl.evaluate.plan import EvaluationPlan, EvaluatedModel, identity, inspect_model, make_plan, model_inputs
from llmctl.evaluate.figures import require_known
from llmctl.evaluate.task import EvaluationTask, run_task
from llmctl.models.loading import parse_dtype
from llmctl.models.quantized import loaded_in
from llmctl.reward.model import RewardModel, load_reward_model
from llmctl.runs.directory import Run
from llmctl.training.model_checks import require_causal

READ_AT_ONCE = 64
"""Sequences that count when threads are chosen for perplexity_task, which is done many at a time."""


@dataclass(frozen=True)
class PreparedEvaluation:
    """All that is settled before a model is loaded."""

    config: EvaluateConfig
    plan: EvaluationPlan | None
    """None for benchmarks."""
    manager: Any
    """Of lm-eval's tasks."""
    subjects: dict[str, EvaluatedModel]
    """`model`, and `compare` where there are two."""
    device: str
    identity: dict[str, Any]
    inputs: list[dict[str, Any]]
    """For the manifest."""


def prepare(config: EvaluateConfig, clock: str | None) -> PreparedEvaluation:
    """Read and check everything but weights: all that a dry run does.

    Raises:
        UserError: its subclasses, for what will not go.
    """
    device = hardware.pick_device(config.device)
    manager = find_tasks(config) if config.tasks else None
    plan = None if config.tasks else make_plan(config, clock)
    names = {"model": config.model, **({"compare": config.compare} if config.compare else {})}
    subjects = {side: inspect_model(config, plan, name) for side, name in names.items()}
    if plan is not None:
        require_known(config.require, _names(config, plan))
    data = [] if plan is None else plan.inputs
    found = identity(config, data)
    return PreparedEvaluation(
        config, plan, manager, subjects, device, found, [*model_inputs(config, found), *data]
    )


def evaluate(found: PreparedEvaluation, rows: RowLog, run: Run | None) -> dict[str, Any]:
    """Do what is missing, and return every figure."""
    config, plan = found.config, found.plan
    sides: dict[str, list[Row]] = {}

    @cache
    def judge() -> RewardModel:
        assert config.reward_model is not None
        return load_reward_model(config.reward_model, device=found.device)

    for side, subject in found.subjects.items():
        work = _work(found, side, subject, judge, run)
        with hardware.memory_errors():
            sides[side] = run_task(work, side, rows, subject.reference)
    result: dict[str, Any] = {"rows": len(sides["model"]), **_figures(plan, sides["model"])}
    if config.compare is not None:
        result["compare"] = {"model": config.compare, **_figures(plan, sides["compare"])}
        result |= _compared(config, plan, sides)
    return result


def require_same_identity(began: dict[str, Any] | None, now: dict[str, Any]) -> None:
    """Refuse to go on with a run that began as another.

    Raises:
        ModelError: naming what differs.
    """
    changed = [name for name in now if began is not None and began.get(name) != now[name]]
    if began is not None and changed:
        what = ", ".join(f"{name}: {began.get(name)} -> {now[name]}" for name in changed)
        raise ModelError(
            f"the run began with other settings ({what})",
            hint="give those it began with, or choose another --out",
        )


def _work(
    found: PreparedEvaluation,
    side: str,
    subject: EvaluatedModel,
    judge: Callable[[], RewardModel],
    run: Run | None,
) -> EvaluationTask:
    """What is to be done on one model, which is loaded once there is something to do."""
    config, plan = found.config, found.plan

    @cache
    def load() -> PreTrainedModel:
        rows = config.batch_size if plan is None or plan.generates else READ_AT_ONCE
        model = load_to_write(
            subject.reference, config, subject.shape, device=found.device, rows=rows
        )
        if loaded_in(model) == "full":  # 8 bits choose outliers by all tokens, later ones too
            require_causal(model, int(subject.shape.get_text_config().vocab_size))
        return model

    @cache
    def load_labeller_x() -> Any:
        hardware.set_threads(config.threads)
        dtype = parse_dtype(config.dtype, found.device, subject.shape.dtype)
        return load_evaluated_classifier(subject, dtype, found.device)

    if plan is None:
        return benchmark_task(config, subject, load, found.manager, run, side)
    if subject.labels is not None:
        return classification_task(config, plan, subject, load_labeller_x)
    if plan.data.kind == "documents":
        return perplexity_task(config, plan, subject, load)
    return generation_task(config, plan, subject, load, judge)


def _names(config: EvaluateConfig, plan: EvaluationPlan) -> list[str]:
    """Figures that gates can be set on."""
    names = figure_names(plan.metrics)
    apart = [f"difference/{name}" for name in quotient_names(plan.metrics)] if config.compare else []
    wins = ["win_rate"] if config.compare and config.reward_model else []
    return [*names, *(["cut_share"] if plan.generates else []), *apart, *wins]


def _figures(plan: EvaluationPlan | None, rows: list[Row]) -> dict[str, Any]:
    return task_figures(rows) if plan is None else compute_figures(rows, plan.metrics)


def _compared(
    config: EvaluateConfig, plan: EvaluationPlan | None, sides: dict[str, list[Row]]
) -> dict[str, Any]:
    ours, theirs = sides["model"], sides["compare"]
    if plan is None:
        one, other = task_values(ours), task_values(theirs)
        return {
            "differences": {
                name: difference(_column(one[name]), _column(other[name]), config.seed)
                for name in one
                if len(one[name]) == len(other.get(name, ()))
            }
        }
    names = quotient_names(plan.metrics)
    if "loss" in names and [row["tokens"] for row in ours] != [row["tokens"] for row in theirs]:
        names.remove("loss")  # by the token of different tokenizers: not to be compared
    apart = differences(*pair_rows(ours, theirs), names, config.seed)
    wins = win_rate(ours, theirs) if config.reward_model else {}
    return {"differences": apart, **wins}


def _column(values: list[float]) -> Any:
    """A figure that is a mean, as numerators and denominators."""
    return np.array([values, [1.0] * len(values)], dtype=np.float64).T

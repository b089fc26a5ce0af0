"""An evaluation from end to end: prepare, compute the rows of one model or two, sum them up."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from llmctl import hardware
from llmctl.config.commands.evaluate import EvaluateConfig
from llmctl.decode.loop import load_for_generation
from llmctl.errors import ModelError
from llmctl.evaluate.aggregate import compute_figures, count_comparisons, quotient_names
from llmctl.evaluate.benchmarks import benchmark_task, find_tasks
from llmctl.evaluate.classification_task import classification_task, load_evaluated_classifier
from llmctl.evaluate.compare import difference, differences, pair_rows, win_rate
from llmctl.evaluate.figures import COMPARISON, require_known
from llmctl.evaluate.generation_task import generation_task
from llmctl.evaluate.perplexity import perplexity_task
from llmctl.evaluate.prepare import (
    EvaluatedModel,
    EvaluationPlan,
    identity,
    inspect_model,
    make_plan,
    model_inputs,
    read_inputs,
    require_suited,
)
from llmctl.evaluate.task import EvaluationTask, Row, RowLog, run_task
from llmctl.models.loading import parse_dtype
from llmctl.models.quantized import loaded_in
from llmctl.reward.model import RewardModel, load_reward_model
from llmctl.runs.directory import Run
from llmctl.training.model_checks import require_causal

READ_AT_ONCE = 64
"""Sequences that count when threads are chosen for perplexity, which takes many at a time."""


@dataclass(frozen=True)
class PreparedEvaluation:
    """A checked evaluation, whose models are not loaded yet."""

    config: EvaluateConfig
    plan: EvaluationPlan | None
    """None for benchmarks."""
    manager: Any
    """Manager of lm-eval's tasks."""
    models: dict[str, EvaluatedModel]
    """`model`, and `compare` where there are two."""
    device: str
    identity: dict[str, Any]
    inputs: list[dict[str, Any]]
    """For the manifest."""


def prepare(config: EvaluateConfig, clock: str | None) -> PreparedEvaluation:
    """Read and check everything but weights; a dry run does no more.

    Raises:
        UserError: and its subclasses, for data, models and settings that do not go together.
    """
    device = hardware.pick_device(config.device)
    manager = find_tasks(config) if config.tasks else None
    read = None if config.tasks else read_inputs(config)
    names = {"model": config.model, **({"compare": config.compare} if config.compare else {})}
    models = {side: inspect_model(name) for side, name in names.items()}
    plan = None if read is None else make_plan(config, read, models.values(), clock)
    for evaluated in models.values():
        require_suited(config, plan, evaluated)
    if plan is not None:
        require_known(config.require, _names(config, plan))
    data = [] if plan is None else plan.inputs
    run_identity = identity(config, data)
    inputs = [*model_inputs(config, run_identity), *data]
    return PreparedEvaluation(config, plan, manager, models, device, run_identity, inputs)


def evaluate(prepared: PreparedEvaluation, rows: RowLog, run: Run | None) -> dict[str, Any]:
    """Compute the rows that are missing, and return every figure."""
    config, plan = prepared.config, prepared.plan
    sides: dict[str, list[Row]] = {}

    @cache
    def load_reward() -> RewardModel:
        assert config.reward_model is not None
        model = load_reward_model(
            config.reward_model, device=prepared.device, score_at=config.score_at
        )
        if run is not None:
            run.record(score_at=model.score_at)
        return model

    for side, evaluated in prepared.models.items():
        task = _task(prepared, side, evaluated, load_reward, run)
        with hardware.memory_errors():
            sides[side] = run_task(task, side, rows, evaluated.reference)
    result: dict[str, Any] = {"rows": len(sides["model"]), **_figures(plan, sides["model"])}
    if config.compare is not None:
        result["compare"] = {"model": config.compare, **_figures(plan, sides["compare"])}
        result |= _comparison(config, plan, sides)
    return result


def require_same_identity(began: dict[str, Any] | None, now: dict[str, Any]) -> None:
    """Refuse to resume a run that began with other settings, data or weights.

    Raises:
        ModelError: naming what differs.
    """
    began = now if began is None else began
    names = [name for name, value in now.items() if began.get(name) != value]
    changed = [f"{name}: {began.get(name)} -> {now[name]}" for name in names]
    if changed:
        raise ModelError(
            f"the run began with other settings ({', '.join(changed)})",
            hint="give those it began with, or choose another --out",
        )


def _task(
    prepared: PreparedEvaluation,
    side: str,
    evaluated: EvaluatedModel,
    load_reward: Callable[[], RewardModel],
    run: Run | None,
) -> EvaluationTask:
    """The task of one model, which is loaded once there is something to compute."""
    config, plan = prepared.config, prepared.plan

    @cache
    def load() -> PreTrainedModel:
        rows = config.batch_size if plan is None or plan.generates else READ_AT_ONCE
        model = load_for_generation(
            evaluated.reference, config, evaluated.shape, device=prepared.device, rows=rows
        )
        if loaded_in(model) == "full":  # 8 bits choose outliers by all tokens, later ones too
            require_causal(model, int(evaluated.shape.get_text_config().vocab_size))
        return model

    @cache
    def load_classifier() -> Any:
        hardware.set_threads(config.threads)
        dtype = parse_dtype(config.dtype, prepared.device, evaluated.shape.dtype)
        return load_evaluated_classifier(evaluated, dtype, prepared.device)

    if plan is None:
        return benchmark_task(config, evaluated, load, prepared.manager, run, side)
    if evaluated.labels is not None:
        return classification_task(config, plan, evaluated, load_classifier)
    if plan.data.kind == "documents":
        return perplexity_task(config, plan, evaluated, load)
    return generation_task(config, plan, evaluated, load, load_reward)


def _names(config: EvaluateConfig, plan: EvaluationPlan) -> list[str]:
    """Names of the figures that gates can be set on."""
    others = [metric for metric in plan.metrics if metric in ("perplexity", "f1")]
    names = list(dict.fromkeys([*others, *quotient_names(plan.metrics)]))
    if plan.generates:
        names += ["cut_share"]
        names += ["ambiguous_share"] if {"accuracy", "f1"} & set(plan.metrics) else []
    if config.compare:
        names += [f"difference/{name}" for name in quotient_names(plan.metrics)]
        names += ["win_rate"] if config.reward_model else []
    return names


def _figures(plan: EvaluationPlan | None, rows: list[Row]) -> dict[str, Any]:
    if plan is None:
        return _merged(rows, "figures")
    compares = any("named" in row or "exact" in row for row in rows)
    comparison = {COMPARISON: count_comparisons(rows)} if compares else {}
    return {**compute_figures(rows, plan.metrics), **comparison}


def _merged(rows: list[Row], key: str) -> dict[str, Any]:
    """The figures of all benchmarks, or the values of their samples, by figure."""
    return {name: value for row in rows for name, value in row[key].items()}


def _comparison(
    config: EvaluateConfig, plan: EvaluationPlan | None, sides: dict[str, list[Row]]
) -> dict[str, Any]:
    ours, theirs = sides["model"], sides["compare"]
    if plan is None:
        their_values = _merged(theirs, "values")
        between = {
            name: difference(_as_quotient(values), _as_quotient(their_values[name]), config.seed)
            for name, values in _merged(ours, "values").items()
            if len(values) == len(their_values.get(name, ()))
        }
        return {"differences": between}
    names = quotient_names(plan.metrics)
    if "loss" in names and [row["tokens"] for row in ours] != [row["tokens"] for row in theirs]:
        names.remove("loss")  # by the token of different tokenizers: not to be compared
    between = differences(*pair_rows(ours, theirs), names, config.seed)
    wins = win_rate(ours, theirs) if config.reward_model else {}
    return {"differences": between, **wins}


def _as_quotient(values: list[float]) -> Any:
    """Numerators and denominators (N, 2) of a mean."""
    return np.array([values, [1.0] * len(values)], dtype=np.float64).T

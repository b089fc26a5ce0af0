"""Benchmarks of lm-eval: the model as llmctl loaded it in, a row for each task out."""

from __future__ import annotations

import difflib
import io
import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, redirect_stderr
from typing import TYPE_CHECKING, Any

from llmctl.config.commands.evaluate import EvaluateConfig
from llmctl.console import is_terminal, log
from llmctl.errors import DataError, NetworkError, UserError, require_extra
from llmctl.evaluate.prepare import EvaluatedModel
from llmctl.evaluate.task import EvaluationTask, Row
from llmctl.numbers import is_number
from llmctl.runs.directory import Run
from llmctl.runs.ownership import SAMPLES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SKIPPED = ("alias", "sample_len", "sample_count", "name")


def find_tasks(config: EvaluateConfig) -> Any:
    """lm-eval's task manager, with the tasks of the config.

    Its own tasks, thousands of files, are indexed only for names that the folders lack.

    Raises:
        DataError: no such folder.
        UserError: no such task.
        ResourceError: lm-eval is not installed.
    """
    require_extra("lm_eval", "lm-eval", "--tasks")
    for folder in config.task_path:
        if not folder.is_dir():
            raise DataError("no such folder of tasks", file=folder)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.tasks import TaskManager

    paths = [str(path) for path in config.task_path]
    manager = TaskManager(include_path=paths, include_defaults=False) if paths else None
    if manager is None or not set(config.tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=paths or None)
    for name in config.tasks:
        if name not in manager.all_tasks:
            close = difflib.get_close_matches(name, manager.all_tasks, n=1)
            raise UserError(
                f"--tasks {name}: lm-eval knows no such task",
                hint=f"did you mean {close[0]}?" if close else "--task-path FOLDER adds your own",
            )
    return manager


def benchmark_task(
    config: EvaluateConfig,
    evaluated: EvaluatedModel,
    load: Callable[[], PreTrainedModel],
    manager: Any,
    run: Run | None,
    side: str,
) -> EvaluationTask:
    """The task of running one benchmark after the other; their samples go to samples.jsonl."""
    before = 0 if side == "model" else len(config.tasks)

    def compute(units: range) -> list[Row]:
        (number,) = units
        task = config.tasks[number]
        results = _evaluate(config, evaluated, load(), manager, task)

        samples = results.get("samples") or {}
        if run is not None:
            for name, task_samples in samples.items():
                for sample in task_samples:
                    origin = {"step": before + number + 1, "side": side, "task": name}
                    run.log({**origin, **_loggable(sample)}, SAMPLES)
        return [{"task": task, "figures": _figures(results), "values": _values(samples)}]

    return EvaluationTask(len(config.tasks), 1, compute)


def _evaluate(
    config: EvaluateConfig,
    evaluated: EvaluatedModel,
    model: PreTrainedModel,
    manager: Any,
    task: str,
) -> dict[str, Any]:
    """Run lm-eval's `evaluate`; its `simple_evaluate` spends seconds on inspecting the machine."""
    from lm_eval import evaluate

    from llmctl.evaluate.harness import HarnessModel

    templated = evaluated.tokenizer.chat_template is not None and not config.plain
    lm = HarnessModel(
        model,
        evaluated.tokenizer,
        templated=templated,
        batch_size=config.batch_size,
        max_length=config.context or evaluated.positions,
    )
    from transformers import set_seed  # with all of its trainer

    with _without_bars():
        loaded = _load_task(manager, task)
    for name, benchmark in loaded["tasks"].items():
        _set_shots(config, name, benchmark)
    set_seed(config.seed)
    with _without_bars():
        results = evaluate(
            lm=lm,
            task_dict=loaded,
            limit=config.limit,
            apply_chat_template=templated,
            fewshot_as_multiturn=True,
            system_instruction=config.system,
            bootstrap_iters=0,
        )
    if lm.cut:
        log.warning(
            "%s: %d texts are longer than the context of %d tokens and lost their beginning",
            *(task, lm.cut, lm.max_length),
        )
    return dict(results)


def _without_bars() -> AbstractContextManager[Any]:
    """Keep the progress bars of lm-eval and datasets from stderr, but on a terminal."""
    shows_bars = is_terminal() and log.isEnabledFor(logging.INFO)
    return nullcontext() if shows_bars else redirect_stderr(io.StringIO())


def _load_task(manager: Any, task: str) -> Any:
    """Load a task and its data.

    Raises:
        DataError: a file of data is missing.
        NetworkError: data that cannot be had.
    """
    try:
        return manager.load([task])
    except ConnectionError as error:
        raise NetworkError(
            f"--tasks {task}: its data cannot be had: {str(error).splitlines()[0]}",
            hint="connect, or pass a task whose data_files are local with --task-path",
        ) from None
    except FileNotFoundError as error:
        raise DataError(f"--tasks {task}: {str(error).splitlines()[0]}") from None


def _set_shots(config: EvaluateConfig, name: str, benchmark: Any) -> None:
    """Set how many examples a task shows, and that none of them asks what is asked."""
    from lm_eval.api.task import ConfigurableTask

    from llmctl.evaluate.harness import OtherQuestions

    own = benchmark.get_config("num_fewshot")
    takes_none = benchmark.OUTPUT_TYPE == "loglikelihood_rolling" or own == 0
    if takes_none and config.shots:
        log.warning("%s takes no examples: --shots is not heeded", name)
    if takes_none or own is None or config.shots is not None:
        count = 0 if takes_none else config.shots or 0
        benchmark.set_config(key="num_fewshot", value=count)
    if isinstance(benchmark, ConfigurableTask):
        OtherQuestions(benchmark)
    benchmark.set_fewshot_seed(seed=config.seed)


def _figures(results: Mapping[str, Any]) -> dict[str, float]:
    """Every figure that lm-eval reports: `gsm8k/exact_match`, with the name of a filter if any."""
    figures = {}
    for part in ("results", "groups"):
        for task, values in (results.get(part) or {}).items():
            for key, value in values.items():
                metric, _, filtered = key.partition(",")
                is_figure = metric not in SKIPPED and not metric.endswith("_stderr")
                if is_figure and is_number(value):
                    name = f"{metric}/{filtered}" if filtered not in ("", "none") else metric
                    figures[f"{task}/{name}"] = float(value)
    return figures


def _values(samples: Mapping[str, Any]) -> dict[str, list[float]]:
    """Each sample's scores that are numbers, in the order of the samples."""
    values: dict[str, list[float]] = {}
    for task, task_samples in samples.items():
        for sample in sorted(task_samples, key=lambda sample: int(sample["doc_id"])):
            filtered = sample.get("filter", "none")
            for metric in sample.get("metrics", ()):
                if isinstance(sample.get(metric), int | float):
                    name = metric if filtered == "none" else f"{metric}/{filtered}"
                    values.setdefault(f"{task}/{name}", []).append(float(sample[metric]))
    return values


def _loggable(sample: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a sample that go to samples.jsonl."""
    keep = ("doc_id", "target", "filtered_resps", "filter", *sample.get("metrics", ()))
    return {key: sample[key] for key in keep if key in sample and _is_json(sample[key])}


def _is_json(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_json, value))
    return value is None or isinstance(value, str | int | float)

"""Read what runs left on disk, for a report.

In: paths that a user named. Out: one `RunRecord` a run, in the order in which they started, without
secrets and control characters. Damaged lines are left out, and counted.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llmctl import metrics
from llmctl.config.base import read_recipe
from llmctl.console import CONTROL_CHARACTERS
from llmctl.errors import DataError, UserError
from llmctl.numbers import counted
from llmctl.redact import redact
from llmctl.runs.listing import RunSummary, list_runs, summarize
from llmctl.runs.ownership import METRICS, ROWS, SAMPLES, parse_object, read_json

REPORT = "report.json"
PIPELINE = "pipeline.json"
MOST_BYTES = 200_000_000
"""Most bytes of a file of lines: more is no metrics."""
MOST_ROWS = 200
"""Most samples, and most rows of an evaluation, that are kept."""


@dataclass(frozen=True)
class RunRecord:
    """The files of one run."""

    path: Path
    name: str
    """Short, and unique in the report."""
    stage: str
    summary: RunSummary
    manifest: dict[str, Any]
    status: dict[str, Any]
    recipe: dict[str, Any]
    metrics: tuple[dict[str, Any], ...]
    samples: tuple[dict[str, Any], ...]
    rows: tuple[dict[str, Any], ...]
    """Rows that `evaluate` measured."""
    report: dict[str, Any]
    notes: tuple[str, ...]

    @property
    def state(self) -> str:
        """State as in `llmctl runs`."""
        return self.summary.status

    @property
    def result(self) -> dict[str, Any]:
        """The result; of a run without one, the latest value of every metric."""
        result = self.manifest.get("result")
        if isinstance(result, dict):
            return result
        return {key: value for row in self.metrics for key, value in row.items()}

    @property
    def seconds(self) -> float | None:
        """Seconds that it worked, over all resumptions."""
        counted = as_mapping(self.manifest.get("energy")).get("seconds")
        if isinstance(counted, int | float):
            return float(counted)
        ends = [_time(self.manifest.get(name)) for name in ("started", "finished")]
        return (ends[1] - ends[0]).total_seconds() if ends[0] and ends[1] else None


def read_records(named: Sequence[Path]) -> tuple[list[RunRecord], list[str]]:
    """Read every named run, those in named folders, and notes on those that were left out.

    Raises:
        DataError: nothing there, no run, or one that cannot be read.
    """
    summaries: dict[Path, RunSummary] = {}
    notes: list[str] = []
    for path in named:
        for summary in _summaries(path):
            place = Path(summary.path)
            if summary.status != "damaged":
                summaries.setdefault(place.resolve(), summary)
            elif place == path:
                raise DataError(
                    "this run cannot be read: its manifest.json or status.json is damaged",
                    file=path,
                )
            else:
                notes.append(f"{place.name} is left out: its records are damaged")
    names = unique_names([Path(summary.path) for summary in summaries.values()])
    records = [_read(s, name) for s, name in zip(summaries.values(), names, strict=True)]
    if not records:
        raise DataError("all of its runs are damaged", file=named[0])
    return sorted(records, key=_started), notes


@dataclass(frozen=True)
class FolderExtras:
    """Files beside the runs of a folder."""

    generated: list[tuple[str, list[dict[str, Any]]]]
    """Name and rows of files that `llmctl generate` wrote."""
    gates: list[tuple[str, dict[str, Any]]]
    """Stage's name and entry of every gate of `llmctl run`."""


def read_extras(named: Sequence[Path]) -> FolderExtras:
    """Read the generated texts and gates in the named folders."""
    several = len(named) > 1
    files = [file for path in named for file in sorted(path.glob("*.jsonl"))]
    texts = zip(
        unique_names(files) if several else (file.name for file in files), files, strict=True
    )
    generated = []
    for name, file in texts:
        rows, _ = _read_jsonl(file, MOST_ROWS)
        if rows and all({"prompt", "response", "finish_reason"} <= row.keys() for row in rows):
            generated.append((clean(name), rows))
    gates = [
        (clean(f"{folder}/{stage}") if several else stage, gate)
        for folder, path in zip(unique_names(named), named, strict=True)
        for stage, gate in _gates(path / PIPELINE)
    ]
    return FolderExtras(generated, gates)


def _gates(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    stages = clean(read_json(file)).get("stages")
    for stage in stages if isinstance(stages, list) else []:
        gates = stage.get("gates") if isinstance(stage, dict) else None
        for gate in gates if isinstance(gates, list) else []:
            if isinstance(gate, dict):
                yield str(stage.get("name")), gate


def _summaries(path: Path) -> list[RunSummary]:
    if not path.exists():
        raise DataError("no such directory", file=path, hint="pass a run, or a folder of runs")
    if not path.is_dir():
        raise DataError("not a directory", file=path, hint="pass a run, or a folder of runs")
    if _is_run(path):
        return [summarize(path, datetime.now(UTC))]
    summaries = [s for s in list_runs(path) if not (Path(s.path) / PIPELINE).exists()]
    if not summaries:
        raise DataError("no runs in this directory", file=path, hint="pass a run's directory")
    return summaries


def _is_run(path: Path) -> bool:
    """Whether a folder is a run, and not one that `llmctl run` filled with runs."""
    records = ("manifest.json", "status.json")
    return any((path / name).exists() for name in records) and not (path / PIPELINE).exists()


def _read(summary: RunSummary, name: str) -> RunRecord:
    path = Path(summary.path)
    metrics, bad = _read_jsonl(path / METRICS)
    samples, _ = _read_jsonl(path / SAMPLES)
    rows, _ = _read_jsonl(path / ROWS, MOST_ROWS)
    notes = (
        [f"{METRICS}: {counted(bad, 'damaged line is', 'damaged lines are')} left out"]
        if bad
        else []
    )
    notes += _alarms(metrics)
    recipe: dict[str, Any] = {}
    try:
        recipe = read_recipe(path / "recipe.yaml")[0] if (path / "recipe.yaml").exists() else {}
    except UserError as error:
        notes.append(f"recipe.yaml: {error.message}")
    return RunRecord(
        path=path,
        name=clean(name),
        stage=clean(summary.stage or "run"),
        summary=summary,
        manifest=clean(read_json(path / "manifest.json")),
        status=clean(read_json(path / "status.json")),
        recipe=clean(recipe),
        metrics=tuple(metrics),
        samples=tuple(samples),
        rows=tuple(rows),
        report=clean(read_json(path / REPORT)),
        notes=tuple(notes),
    )


def clean(value: Any, known: dict[str, str] | None = None) -> Any:
    """A value from a file, every text in it without secrets and control characters.

    Args:
        value: as JSON or YAML gives it.
        known: texts that were cleaned before; keys are the same in every line of a file.
    """
    known = {} if known is None else known
    if isinstance(value, str):
        if value not in known:
            known[value] = (
                redact(value).encode("utf-8", "replace").decode().translate(CONTROL_CHARACTERS)
            )
        return known[value]
    if isinstance(value, dict):
        return {clean(str(key), known): clean(item, known) for key, item in value.items()}
    if isinstance(value, list):
        return [clean(item, known) for item in value]
    return value


def _read_jsonl(file: Path, most: int | None = None) -> tuple[list[dict[str, Any]], int]:
    """Read the objects of a file of lines, and count the lines that are none."""
    if not file.is_file() or file.stat().st_size > MOST_BYTES:
        return [], 0
    lines = [line for line in file.read_bytes().split(b"\n") if line.strip()]
    rows = [parse_object(line) for line in lines[:most]]
    known: dict[str, str] = {}
    return [clean(row, known) for row in rows if row], sum(not row for row in rows)


def _alarms(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Describe PPO's alarms, each with the step at which it rang first."""
    steps_of: dict[str, list[Any]] = {}
    for row in rows:
        alarms = row.get("alarms")
        for name in alarms if isinstance(alarms, list) else []:
            steps_of.setdefault(str(name), []).append(row.get("step"))
    return [
        f"alarm at step {steps[0]}: {metrics.label(name)}"
        + (f", and {counted(len(steps) - 1, 'more time')}" if len(steps) > 1 else "")
        for name, steps in steps_of.items()
    ]


def unique_names(paths: Sequence[Path]) -> Iterator[str]:
    """Yield the last part of each path, with its parent where two are the same."""
    count = Counter(path.absolute().name for path in paths)
    for path in paths:
        whole = path.absolute()
        yield whole.name if count[whole.name] == 1 else f"{whole.parent.name}/{whole.name}"


def _started(record: RunRecord) -> datetime:
    began = _time(record.manifest.get("started"))
    return began or _time(record.summary.updated) or datetime.now(UTC)


def _time(text: Any) -> datetime | None:
    try:
        return datetime.fromisoformat(text).astimezone(UTC)
    except (TypeError, ValueError):
        return None


def as_mapping(value: Any) -> dict[str, Any]:
    """Return a value that is a mapping, an empty one for any other."""
    return value if isinstance(value, dict) else {}

"""Find run directories and summarize each from its small files alone.

In: a folder. Out: a `RunSummary` of every run in and under it.
"""

import json
import os
import shlex
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llmctl.files import finite
from llmctl.runs.lock import LOCK, is_held
from llmctl.runs.ownership import ASIDE, EVENTS, OWN_FOLDERS, is_llmctl_manifest, parse_object

DEEPEST = 5
"""Levels of folders to look into."""
TAIL_BYTES = 1 << 18
"""Bytes at the end of metrics.jsonl to read."""
TORCHRUN = ("torchrun", "--nnodes")
RENDEZVOUS = ("--rdzv-backend", "c10d", "--rdzv-endpoint", "HOST:29500", "-m", "llmctl")
"""HOST is one of the machines; the command is to be started on each."""
NOT_SEARCHED = {*OWN_FOLDERS, EVENTS, "checkpoints", ASIDE, "node_modules", "__pycache__"}


@dataclass(frozen=True)
class RunSummary:
    """State of one run."""

    path: str
    stage: str | None
    status: str
    """As in status.json; `killed` if no process runs it, `damaged` if its files cannot be read."""
    step: int | None
    max_steps: int | None
    loss: float | None
    val_loss: float | None
    updated: str
    age_seconds: int
    bytes: int
    resumable: bool
    resume: str | None
    """The command that resumes it."""


def list_runs(root: Path) -> list[RunSummary]:
    """Summarize every run under a directory, itself included, the newest first."""
    runs: dict[str, Path] = {}
    for path in _run_folders(root, DEEPEST):
        runs.setdefault(os.path.realpath(path), path)
    now = datetime.now(UTC)
    return sorted((summarize(path, now) for path in runs.values()), key=lambda s: s.age_seconds)


def summarize(path: Path, now: datetime) -> RunSummary:
    """Summarize a run; a broken file makes it `damaged`, never an error."""
    status, manifest = _object(path / "status.json"), _object(path / "manifest.json")
    state = _state(path, status, manifest)
    status, manifest = status or {}, manifest or {}
    saved = any((path / "checkpoints").glob("checkpoint-*"))
    resumable = state not in ("running", "completed", "damaged") and saved
    stage = _typed(manifest.get("stage"), str)
    last = _last_metrics(path / "metrics.jsonl")
    plan = _typed(manifest.get("plan"), dict) or {}
    steps = (status.get("step"), last.get("step"))
    updated = _updated(path, status)
    return RunSummary(
        path=str(path),
        stage=stage,
        status=state,
        step=max((step for step in steps if isinstance(step, int)), default=None),
        max_steps=_typed(plan.get("max_steps"), int),
        loss=_number(last.get("loss")),
        val_loss=_number(last.get("val_loss")),
        updated=updated.isoformat(timespec="seconds"),
        age_seconds=max(0, round((now - updated).total_seconds())),
        bytes=_size(path),
        resumable=resumable,
        resume=_resume_command(path, stage, manifest) if resumable and stage else None,
    )


def _run_folders(folder: Path, depth: int) -> Iterator[Path]:
    """Yield the runs in and under a folder, linked ones included; follow no other link."""
    try:
        with os.scandir(folder) as entries:
            names = {entry.name: entry for entry in entries}
    except OSError:
        return
    if _is_run(folder, names):
        yield folder
    inner = [e for e in names.values() if e.name not in NOT_SEARCHED and e.name[0] != "."]
    for entry in sorted(inner, key=lambda e: (e.is_symlink(), e.name)):
        if entry.is_symlink():
            target = folder / entry.name
            with suppress(OSError):
                if target.is_dir() and _is_run(target, {p.name for p in target.iterdir()}):
                    yield target
        elif depth and entry.is_dir():
            yield from _run_folders(folder / entry.name, depth - 1)


def _is_run(folder: Path, names: Any) -> bool:
    """Whether llmctl wrote it, as far as files that may be broken can tell."""
    records = {"status.json", "manifest.json"} & set(names)
    if not records or LOCK in names:
        return bool(records)
    manifest = _object(folder / "manifest.json")
    return len(records) == 2 if manifest is None else is_llmctl_manifest(manifest)


def _state(path: Path, status: dict[str, Any] | None, manifest: dict[str, Any] | None) -> str:
    state = _typed((status or {}).get("state"), str)
    has_none = not (path / "status.json").exists()  # killed before it could be written
    if manifest is None or not isinstance(manifest.get("stage"), str) or not (state or has_none):
        return "damaged"
    if state is None or state == "running":
        return "running" if is_held(path) else "killed"
    return str(state)


def _object(path: Path) -> dict[str, Any] | None:
    """Read the object in a JSON file; None for anything else."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _last_metrics(path: Path) -> dict[str, Any]:
    """Read the latest loss, val_loss and step, passing over lines that are torn or foreign."""
    metrics: dict[str, Any] = {}
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            lines = file.read().split(b"\n")
    except OSError:
        return metrics
    for line in reversed(lines):
        wanted = [k for k in ("step", "loss", "val_loss") if k not in metrics]
        if not wanted:
            break
        if not any(f'"{key}"'.encode() in line for key in wanted):
            continue
        metrics = {**parse_object(line), **metrics}
    return metrics


def _updated(path: Path, status: dict[str, Any]) -> datetime:
    """Return when status.json was written: as it says, else as the file system says."""
    with suppress(KeyError, ValueError, TypeError):
        return datetime.fromisoformat(status["updated"]).astimezone(UTC)
    for file in (path / "status.json", path):
        with suppress(OSError):
            return datetime.fromtimestamp(file.stat().st_mtime, UTC)
    return datetime.now(UTC)


def _size(folder: Path) -> int:
    """Count the bytes of all files in a folder; those that vanish meanwhile are left out."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += os.lstat(os.path.join(place, name)).st_size  # noqa: PTH118
    return total


def _resume_command(path: Path, stage: str, manifest: dict[str, Any]) -> str:
    """Build the command that resumes a run with as many processes as it had, on as many machines.

    It has the changes that an earlier resume was allowed.
    """
    place = f"./{path}" if str(path).startswith("-") else str(path)
    recipe = os.path.join(place, "recipe.yaml")  # noqa: PTH118
    resumed = _typed(manifest.get("resumed"), dict) or {}
    changed = _typed(resumed.get("changed"), dict)
    allow = ["--resume-allow", ",".join(changed)] if changed else []
    world, machines = (_typed(manifest.get(n), int) or 1 for n in ("world_size", "machines"))
    start, several = ["llmctl"], []
    if machines > 1:
        start = [*TORCHRUN, str(machines), "--nproc-per-node", str(world // machines), *RENDEZVOUS]
    elif world > 1:
        several = ["--processes", str(world)]
    return shlex.join([*start, stage, "-c", recipe, "-o", place, *several, "--resume", *allow])


def _number(value: Any) -> float | None:
    return finite(float(value)) if isinstance(value, int | float) else None


def _typed(value: Any, kind: type) -> Any:
    return value if isinstance(value, kind) else None

"""pipeline.json: which stages of a life cycle ran, from what, and how each one stands.

It is written before a stage begins and after it ends, at once on disk, so that a kill at any
instant leaves it true. Whether a stage is complete is said by its own run.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llmctl.errors import OutputError
from llmctl.files import sha256_file, write_json
from llmctl.pipeline.references import Stage
from llmctl.runs.directory import now, read_manifest
from llmctl.runs.ownership import read_json
from llmctl.runs.provenance import git, versions

FILE = "pipeline.json"
Action = Literal["skip", "begin", "resume", "replace"]


@dataclass
class PipelineStatus:
    """The content of pipeline.json."""

    path: Path
    summary: dict[str, Any]
    """Keys of the whole life cycle."""
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Keys of each stage, by name, in order."""

    def update_stage(self, stage: Stage, **values: Any) -> None:
        """Set keys of a stage, at once on disk."""
        entry = self.entries.setdefault(stage.name, {"name": stage.name, "stage": stage.stage})
        entry.update(out=str(stage.out), inputs=list(stage.inputs), **values)
        self.update()

    def update(self, **values: Any) -> None:
        """Set keys of the whole, at once on disk."""
        self.summary.update(values, updated=now())
        write_json(self.path, {**self.summary, "stages": list(self.entries.values())})

    def entry(self, stage: Stage) -> Mapping[str, Any]:
        """Return the keys of a stage; empty for one that never ran."""
        return self.entries.get(stage.name, {})


def open_status(out: Path, recipe: Path, stages: tuple[Stage, ...]) -> PipelineStatus:
    """Begin the status of a directory; stages that the recipe no longer has stay at the end.

    Raises:
        OutputError: the directory is a run itself.
    """
    status = read_status(out)
    earlier = status.entries
    ordered = {stage.name: earlier[stage.name] for stage in stages if stage.name in earlier}
    status.entries = {**ordered, **earlier}
    status.summary = {
        "recipe": str(recipe),
        "command": ["llmctl", *sys.argv[1:]],
        "versions": versions(),
        "git": git(),
        "state": "running",
        "started": now(),
        "exit_code": None,
        "error": None,
    }
    return status


def read_status(out: Path) -> PipelineStatus:
    """Read a directory's pipeline.json; the result is not to be written.

    Raises:
        OutputError: the directory is a run itself.
    """
    if (out / "manifest.json").exists():
        raise OutputError("this is the directory of one run", file=out, hint="choose another --out")
    stages = read_json(out / FILE).get("stages")
    entries = [e for e in stages if isinstance(e, dict)] if isinstance(stages, list) else []
    return PipelineStatus(out / FILE, {}, {str(e.get("name")): e for e in entries})


def choose_action(
    stage: Stage, address: str, entry: Mapping[str, Any], *, forced: bool = False
) -> Action:
    """Decide whether a stage runs, and how, by its content hash and its keys in pipeline.json.

    A forced one runs also where nothing has changed.

    Raises:
        OutputError: its directory holds what no life cycle put there.
    """
    exists = stage.out.is_file() or (stage.out.is_dir() and any(stage.out.iterdir()))
    if not entry:
        if exists and not forced:
            raise OutputError(
                "holds something that this life cycle did not make",
                file=stage.out,
                hint="choose another --out, or --overwrite to replace what llmctl wrote there",
            )
        return "replace" if exists else "begin"
    if not exists:
        return "begin"
    if forced or entry.get("address") != address or not is_new(stage, entry):
        return "replace"
    if is_complete(stage, entry):
        return "skip"
    can_resume = "resume" in type(stage.config).model_fields and not _has_completed(stage)
    return "resume" if can_resume else "replace"


def is_new(stage: Stage, entry: Mapping[str, Any]) -> bool:
    """Whether the run in its directory is another than the one that the stage was to replace."""
    if stage.is_file:
        return True
    run_id = read_manifest(stage.out).get("run_id")
    return run_id is not None and run_id != entry.get("replaces")


def is_complete(stage: Stage, entry: Mapping[str, Any]) -> bool:
    """Whether the stage ran to its end, and all that it wrote is there."""
    if stage.is_file:
        return (
            entry.get("state") == "completed"
            and stage.out.is_file()
            and sha256_file(stage.out) == entry.get("sha256")
        )
    if not is_new(stage, entry) or not _has_completed(stage):
        return False
    outputs = read_manifest(stage.out).get("outputs", [])
    files = [(stage.out / output["path"], output["bytes"]) for output in outputs]
    return all(path.is_file() and path.stat().st_size == size for path, size in files)


def _has_completed(stage: Stage) -> bool:
    return read_json(stage.out / "status.json").get("state") == "completed"


def result_of(stage: Stage, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the result of a complete stage."""
    result = entry.get("result") or read_manifest(stage.out).get("result")
    return dict(result) if isinstance(result, Mapping) else {}

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
Todo = Literal["skip", "begin", "resume", "replace"]


@dataclass
class Journal:
    """What pipeline.json holds."""

    path: Path
    facts: dict[str, Any]
    """About the whole."""
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    """About each stage, by name, in order."""

    def note(self, stage: Stage, **facts: Any) -> None:
        """Write facts about a stage."""
        known = self.stages.setdefault(stage.name, {"name": stage.name, "stage": stage.stage})
        known.update(out=str(stage.out), inputs=list(stage.inputs), **facts)
        self.write()

    def write(self, **facts: Any) -> None:
        """Write facts about the whole."""
        self.facts.update(facts, updated=now())
        stages = list(self.stages.values())
        write_json(self.path, {**self.facts, "stages": stages})

    def record(self, stage: Stage) -> Mapping[str, Any]:
        """What is known of a stage; empty for none."""
        return self.stages.get(stage.name, {})


def open_journal(out: Path, recipe: Path, stages: tuple[Stage, ...]) -> Journal:
    """The journal of a directory, in which former stages stay at the end.

    Raises:
        OutputError: the directory is a run itself.
    """
    journal = read_journal(out)
    known = journal.stages
    ordered = {stage.name: known[stage.name] for stage in stages if stage.name in known}
    journal.stages = {**ordered, **known}
    journal.facts = {
        "recipe": str(recipe),
        "command": ["llmctl", *sys.argv[1:]],
        "versions": versions(),
        "git": git(),
        "state": "running",
        "started": now(),
        "exit_code": None,
        "error": None,
    }
    return journal


def read_journal(out: Path) -> Journal:
    """What a directory's pipeline.json says, for reading alone."""
    if (out / "manifest.json").exists():
        raise OutputError("this is the directory of one run", file=out, hint="choose another --out")
    entries = read_json(out / FILE).get("stages")
    found = [e for e in entries if isinstance(e, dict)] if isinstance(entries, list) else []
    return Journal(out / FILE, {}, {str(e.get("name")): e for e in found})


def todo(stage: Stage, address: str, known: Mapping[str, Any], *, anew: bool = False) -> Todo:
    """What is to be done about a stage.

    Args:
        stage: as it is to be.
        address: its content address.
        known: what the journal says of it.
        anew: run it also where nothing has changed.

    Raises:
        OutputError: its directory holds what no life cycle put there.
    """
    there = stage.out.is_file() or (stage.out.is_dir() and any(stage.out.iterdir()))
    if not known:
        if there and not anew:
            raise OutputError(
                "holds something that this life cycle did not make",
                file=stage.out,
                hint="choose another --out, or --overwrite to replace what llmctl wrote there",
            )
        return "replace" if there else "begin"
    if not there:
        return "begin"
    if anew or known.get("address") != address or not is_new(stage, known):
        return "replace"
    if is_complete(stage, known):
        return "skip"
    goes_on = "resume" in type(stage.config).model_fields and not _has_completed(stage)
    return "resume" if goes_on else "replace"


def is_new(stage: Stage, known: Mapping[str, Any]) -> bool:
    """Whether what stands there is not the run that this stage was to replace."""
    if stage.is_file:
        return True
    run_id = read_manifest(stage.out).get("run_id")
    return run_id is not None and run_id != known.get("replaces")


def is_complete(stage: Stage, known: Mapping[str, Any]) -> bool:
    """Whether the stage ran to its end, and all that it wrote is there."""
    if stage.is_file:
        return (
            known.get("state") == "completed"
            and stage.out.is_file()
            and sha256_file(stage.out) == known.get("sha256")
        )
    if not is_new(stage, known):
        return False
    if not _has_completed(stage):
        return False
    outputs = read_manifest(stage.out).get("outputs", [])
    files = [(stage.out / output["path"], output["bytes"]) for output in outputs]
    return all(path.is_file() and path.stat().st_size == size for path, size in files)


def _has_completed(stage: Stage) -> bool:
    return read_json(stage.out / "status.json").get("state") == "completed"


def result_of(stage: Stage, known: Mapping[str, Any]) -> dict[str, Any]:
    """The result of a complete stage."""
    found = known.get("result") or read_manifest(stage.out).get("result")
    return dict(found) if isinstance(found, Mapping) else {}

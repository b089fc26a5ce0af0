"""Claim a run directory, replace the run in it, or restore it after a failure.

Only files that llmctl wrote are ever deleted. With `--overwrite` the earlier run is set aside, and
deleted only once the new one has completed; a run that fails puts it back. A manifest of llmctl's
makes a directory its own: it is the first file that a run writes, and the last that is moved or
removed, so that the next call can tell what a kill at any instant left.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmctl.errors import OutputError, UserError
from llmctl.files import fsync, replace_file, sha256_file, staged
from llmctl.runs.lock import LOCK

MANIFEST = "manifest.json"
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
LOGS = (METRICS, SAMPLES)
ROWS = "rows.jsonl"
OWN_FILES = ("recipe.yaml", "status.json", *LOGS, ROWS, "error.log", MANIFEST)
EVENTS = "tensorboard"
"""TensorBoard's folder: logs like the others, no result."""
OWN_FOLDERS = ("tokenizer", "tokens", "model", "adapter", "value_model", "gguf")
ASIDE = ".replaced"
DOOMED = ".replaced.gone"


@dataclass(frozen=True)
class Claim:
    """A directory that this run may write to, and the files in it that are not this run's."""

    path: Path
    before: frozenset[Path]
    earlier: Mapping[str, bytes] = field(default_factory=dict)
    """Recipe, status and manifest of the resumed run, as it left them."""

    def outputs(self) -> list[dict[str, Any]]:
        """List path, size and sha256 of every result file of this run."""
        return [
            {
                "path": str(file.relative_to(self.path)),
                "bytes": file.stat().st_size,
                "sha256": sha256_file(file),
            }
            for file in self._results()
        ]

    def flush(self) -> None:
        """Sync all results to the disk, before status.json says that the run completed."""
        files = [*self._results(), *(p for name in LOGS for p in self.path.glob(name))]
        folders = {p for file in files for p in file.parents if p.is_relative_to(self.path)}
        for path in (*files, *folders, self.path):
            fsync(path)

    def has_ended(self) -> bool:
        """Whether the resumed run itself recorded how it ended."""
        state = parse_object(self.earlier.get("status.json", b"")).get("state")
        return state in ("preempted", "failed", "diverged")

    def restore(self) -> None:
        """Put back the records of the run that was to be resumed."""
        for name, content in self.earlier.items():
            replace_file(self.path / name, content)

    def undo(self) -> None:
        """Remove what a run wrote that left nothing to keep, and put back what it replaced."""
        if (self.path / ASIDE).is_dir():  # from here on what was replaced is the directory's run
            (self.path / MANIFEST).unlink(missing_ok=True)
        events = (p for p in (self.path / EVENTS).glob("*") if p not in self.before)
        for file in (*self._results(), *events):
            file.unlink()
        self.remove_staged()
        _prune(self.path)
        for name in OWN_FILES:
            for file in (staged(self.path / name), self.path / name):
                if file not in self.before:
                    file.unlink(missing_ok=True)
        _put_back(self.path)

    def remove_staged(self) -> None:
        """Remove folders that were being filled: results and checkpoints, not yet renamed."""
        names = [self.path / f".tmp-{name}" for name in OWN_FOLDERS]
        for folder in (*names, *(self.path / "checkpoints").glob(".tmp-*")):
            shutil.rmtree(folder, ignore_errors=True)

    def _results(self) -> Iterator[Path]:
        for name in OWN_FOLDERS:
            for file in sorted((self.path / name).rglob("*")):
                if file.is_file() and file not in self.before:
                    yield file


def claim(path: Path, *, overwrite: bool, resuming: bool) -> Claim:
    """Claim a directory: refuse one that holds something else, set aside a run to overwrite.

    Raises:
        OutputError: it holds a run, or something foreign.
        UserError: overwriting and resuming at once.
    """
    if overwrite and resuming:
        raise UserError("--overwrite starts anew and --resume continues: give one of them")
    _recover(path)
    present = {p.name for p in path.iterdir()} - {LOCK, *(f".{name}.tmp" for name in OWN_FILES)}
    state = read_json(path / "status.json").get("state")
    is_ours = is_llmctl_manifest(read_json(path / MANIFEST))
    if present and not is_ours:
        _refuse_foreign(path, present, overwrite)
    elif present and not overwrite and (state == "completed" or not resuming):
        raise OutputError(
            f"holds a run that {'was cut off' if state in ('running', None) else f'is {state}'}",
            file=path,
            hint="choose another --out, or --overwrite to replace it"
            + ("" if state == "completed" else "; --resume continues a training run"),
        )
    if is_ours and overwrite:
        _move_written(path, path / ASIDE)
        _prune(path)
    if not resuming:
        return Claim(path, frozenset(p for p in path.rglob("*") if p.is_file()))
    records = (path / name for name in ("recipe.yaml", "status.json", MANIFEST))
    return Claim(path, frozenset(), {p.name: p.read_bytes() for p in records if p.is_file()})


def is_resumable(path: Path) -> bool:
    """Whether a run can be resumed: from a checkpoint, or rows of an evaluation."""
    rows = path / ROWS
    has_rows = rows.is_file() and rows.stat().st_size > 0
    return has_rows or any((path / "checkpoints").glob("checkpoint-*"))


@contextmanager
def made_directory(path: Path) -> Iterator[None]:
    """Make the directory; remove it and its new parents if the body fails and leaves them empty."""
    if (path.is_symlink() or path.exists()) and not path.is_dir():
        raise OutputError("a file is in the way of the run directory", file=path)
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        with suppress(PermissionError):  # one may write where one may not read
            for folder in new:
                fsync(folder.parent)
        yield
    except BaseException:
        for folder in new:
            with suppress(OSError):  # not empty, or never made
                folder.rmdir()
        raise


def is_llmctl_manifest(manifest: Mapping[str, Any]) -> bool:
    """Whether a run of llmctl's wrote the manifest."""
    versions = manifest.get("versions")
    return isinstance(versions, Mapping) and "llmctl" in versions


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file, empty where there is none."""
    try:
        return parse_object(path.read_bytes())
    except OSError:
        return {}


def parse_object(text: bytes) -> dict[str, Any]:
    """Parse a JSON object, empty where it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _refuse_foreign(path: Path, present: set[str], overwrite: bool) -> None:
    if not overwrite:
        raise OutputError(
            "not empty, and not a run of llmctl's",
            file=path,
            hint="choose another --out, or --overwrite to write beside what is there",
        )
    if clash := sorted(present & {*OWN_FILES, *OWN_FOLDERS, EVENTS, "checkpoints"}):
        raise OutputError(
            f"`{clash[0]}` stands here and is not llmctl's", file=path, hint="choose another --out"
        )


def _recover(path: Path) -> None:
    """Finish or undo what a killed run with `--overwrite` left."""
    shutil.rmtree(path / DOOMED, ignore_errors=True)
    if not (path / ASIDE).is_dir():
        return
    here, aside = (is_llmctl_manifest(read_json(p / MANIFEST)) for p in (path, path / ASIDE))
    if here and aside:
        drop_aside(path)
    elif here or aside:
        _put_back(path)


def drop_aside(path: Path) -> None:
    """Delete what a run replaced, under another name: half of it must never be put back."""
    if (path / ASIDE).is_dir():
        (path / ASIDE).rename(path / DOOMED)
        shutil.rmtree(path / DOOMED, ignore_errors=True)


def _put_back(path: Path) -> None:
    _move_written(path / ASIDE, path)
    shutil.rmtree(path / ASIDE, ignore_errors=True)


def _move_written(source: Path, target: Path) -> None:
    """Move what a run wrote: records, results as its manifest lists them, checkpoints."""
    manifest = read_json(source / MANIFEST) or read_json(target / MANIFEST)
    outputs = [output["path"] for output in manifest.get("outputs", [])]
    whole = (*(source / "checkpoints").glob("*checkpoint-*"), *(source / EVENTS).glob("*"))
    moved = [path.relative_to(source) for path in whole]
    for name in (*outputs, *moved, *OWN_FILES):
        if (source / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).rename(target / name)


def _prune(path: Path) -> None:
    """Remove empty folders of llmctl's."""
    for name in (*OWN_FOLDERS, EVENTS, "checkpoints"):
        folders = [*sorted((path / name).rglob("*"), reverse=True), path / name]
        for folder in folders:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

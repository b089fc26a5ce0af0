"""Who owns what in a run directory: claim it, give it back as it was, or replace what was there.

Only files that llmctl wrote are ever deleted. With `--overwrite` the earlier run is set aside, and
deleted only once the new one has completed; a run that fails puts it back.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmctl.errors import OutputError, UserError
from llmctl.files import sha256_file, staged
from llmctl.lock import LOCK

OWN_FILES = ("recipe.yaml", "manifest.json", "status.json", "metrics.jsonl", "error.log")
OWN_FOLDERS = ("tokenizer", "tokens", "model", "adapter", "value_model")
ASIDE = ".replaced"


@dataclass(frozen=True)
class Claim:
    """A directory that this run may write to, and the files in it that are not this run's."""

    path: Path
    before: frozenset[Path]

    def outputs(self) -> list[dict[str, Any]]:
        """Path, size and sha256 of every result file of this run."""
        return [
            {
                "path": str(file.relative_to(self.path)),
                "bytes": file.stat().st_size,
                "sha256": sha256_file(file),
            }
            for file in self._results()
        ]

    def settle(self) -> None:
        """The run completed: what it replaced goes for good."""
        shutil.rmtree(self.path / ASIDE, ignore_errors=True)

    def withdraw(self) -> None:
        """The run left nothing to keep: remove what it wrote, put back what it replaced."""
        for file in self._results():
            file.unlink()
        for name in OWN_FILES:
            for file in (self.path / name, staged(self.path / name)):
                if file not in self.before:
                    file.unlink(missing_ok=True)
        self.sweep()
        _prune(self.path)
        _move_written(self.path / ASIDE, self.path)
        shutil.rmtree(self.path / ASIDE, ignore_errors=True)

    def sweep(self) -> None:
        """Remove the folders that were being filled: results and checkpoints, not yet named."""
        names = [self.path / f".tmp-{name}" for name in OWN_FOLDERS]
        for folder in (*names, *(self.path / "checkpoints").glob(".tmp-*")):
            shutil.rmtree(folder, ignore_errors=True)

    def _results(self) -> Iterator[Path]:
        for name in OWN_FOLDERS:
            for file in sorted((self.path / name).rglob("*")):
                if file.is_file() and file not in self.before:
                    yield file


def claim(path: Path, *, overwrite: bool, resuming: bool) -> Claim:
    """Refuse a directory that holds something else, or set aside what llmctl wrote to it.

    Raises:
        OutputError: it holds a run, or something foreign.
        UserError: overwriting and resuming at once.
    """
    if overwrite and resuming:
        raise UserError("--overwrite starts anew and --resume continues: give one of them")
    shutil.rmtree(path / ASIDE, ignore_errors=True)
    present = {p.name for p in path.iterdir()} - {LOCK}
    state = read_json(path / "status.json").get("state")
    is_ours = state is not None and "llmctl" in read_json(path / "manifest.json").get(
        "versions", {}
    )
    if present and not is_ours:
        _refuse_foreign(path, present, overwrite)
    elif present and not overwrite and (state == "completed" or not resuming):
        raise OutputError(
            f"holds a run that {'was cut off' if state == 'running' else f'is {state}'}",
            file=path,
            hint="choose another --out, or --overwrite to replace it"
            + ("" if state == "completed" else "; --resume continues a training run"),
        )
    if is_ours and overwrite:
        _move_written(path, path / ASIDE)
        _prune(path)
    kept = () if resuming else (p for p in path.rglob("*") if p.is_file())
    return Claim(path, frozenset(kept))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty where there is none."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _refuse_foreign(path: Path, present: set[str], overwrite: bool) -> None:
    if not overwrite:
        raise OutputError(
            "not empty, and not a run of llmctl's",
            file=path,
            hint="choose another --out, or --overwrite to write beside what is there",
        )
    if clash := sorted(present & {*OWN_FILES, *OWN_FOLDERS, "checkpoints"}):
        raise OutputError(
            f"`{clash[0]}` stands here and is not llmctl's", file=path, hint="choose another --out"
        )


def _move_written(source: Path, target: Path) -> None:
    """Move what a run wrote: its records, its results as it listed them, its checkpoints."""
    outputs = read_json(source / "manifest.json").get("outputs", [])
    files = [*(output["path"] for output in outputs), *OWN_FILES]
    folders = [p.relative_to(source) for p in (source / "checkpoints").glob("*checkpoint-*")]
    for name in (*files, *folders):
        if (source / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).rename(target / name)


def _prune(path: Path) -> None:
    """Remove those of llmctl's folders that are empty."""
    for name in (*OWN_FOLDERS, "checkpoints"):
        folders = [*sorted((path / name).rglob("*"), reverse=True), path / name]
        for folder in folders:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

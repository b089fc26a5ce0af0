"""Trace a run back through the runs, models and data that its manifest names.

In: the manifest of a run and its directory. Out: one `LineageStep` a run, the eldest first.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmctl.runs.ownership import OWN_FOLDERS, is_llmctl_manifest, read_json

HUB_ID = re.compile(r"([\w][\w.-]*/[\w.-]+)(?:@[\w./-]+)?")
"""A name on the Hub, and perhaps the revision that it is pinned to."""
MODEL_ROLES = ("model", "base", "adapter", "tokens", "tokenizer", "reward_model", "compare")
"""Roles of inputs that are no data."""
_FOLDERS_BEFORE = re.compile(r"(^|=)~?/.*/")


@dataclass(frozen=True)
class RunInput:
    """One input of a run."""

    role: str
    path: str
    sha256: str | None
    revision: str | None
    run: Path | None
    """Directory of the run that made it, where it can be found."""

    @property
    def is_data(self) -> bool:
        """Whether it is text or rows, not a model or a part of one."""
        return self.role not in MODEL_ROLES

    @property
    def hub_id(self) -> str | None:
        """Its name on the Hub, without a revision; None for a run or a file on this disk."""
        match = HUB_ID.fullmatch(self.path) if self.run is None else None
        return match[1] if match and not Path(self.path).exists() else None


@dataclass(frozen=True)
class LineageStep:
    """One run of a lineage."""

    path: Path
    manifest: Mapping[str, Any]
    inputs: tuple[RunInput, ...]


def inputs_of(path: Path, manifest: Mapping[str, Any]) -> tuple[RunInput, ...]:
    """Read the inputs of a run from its manifest, with the runs that made them."""
    inputs = manifest.get("inputs")
    entries = [e for e in inputs if isinstance(e, dict)] if isinstance(inputs, list) else []
    return tuple(
        RunInput(
            role=str(entry.get("role", "input")),
            path=str(entry.get("path", "")),
            sha256=_text(entry.get("sha256")),
            revision=_text(entry.get("revision")),
            run=run_of(str(entry.get("path", "")), path),
        )
        for entry in entries
    )


def run_of(reference: str, near: Path) -> Path | None:
    """Find the run that a reference names: from here, or beside a run that was moved."""
    path = Path(reference)
    if not reference or "\0" in reference:
        return None
    with suppress(RuntimeError):  # of a user whom this machine does not know
        path = path.expanduser()
    beside = near.absolute().parent
    candidates = (path, beside / path, beside / path.name, beside / path.parent.name)
    for candidate in candidates:
        folder = candidate.parent if candidate.name in OWN_FOLDERS else candidate
        is_itself = folder.absolute() == near.absolute()
        if not is_itself and is_llmctl_manifest(read_json(folder / "manifest.json")):
            return folder
    return None


def lineage_of(path: Path, manifest: Mapping[str, Any]) -> list[LineageStep]:
    """List the run and those that it depends on, the eldest first, each once."""
    return list(_walk(path, manifest, set()))


def portable(word: str) -> str:
    """Hide the folders of this machine in a word of a command: `--data=/home/me/a` as `--data=…/a`.

    Paths under the current directory become relative.
    """
    here = f"{Path.cwd()}/"
    return _FOLDERS_BEFORE.sub(r"\1…/", word.replace(here, "")) if "/" in word else word


def _walk(path: Path, manifest: Mapping[str, Any], seen: set[Path]) -> Iterator[LineageStep]:
    seen.add(path.resolve())
    inputs = inputs_of(path, manifest)
    for run in (i.run for i in inputs if i.run is not None):
        if run.resolve() not in seen:
            yield from _walk(run, read_json(run / "manifest.json"), seen)
    yield LineageStep(path, manifest, inputs)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None

"""Where a run comes from: the runs, models and data that its manifest names, back to the first.

In: the manifest of a run and its directory. Out: one entry a run, the eldest first.
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
    """One thing that a run was given."""

    role: str
    path: str
    sha256: str | None
    revision: str | None
    run: Path | None
    """The run's directory that it is the result of, where it can be found."""

    @property
    def is_data(self) -> bool:
        """Whether it is text or rows, not a model or what belongs to one."""
        return self.role not in MODEL_ROLES

    @property
    def hub_id(self) -> str | None:
        """Its name on the Hub, without a revision; None for what is a run or on this disk."""
        named = HUB_ID.fullmatch(self.path) if self.run is None else None
        return named[1] if named and not Path(self.path).exists() else None


@dataclass(frozen=True)
class LineageStep:
    """A run in a line of runs."""

    path: Path
    manifest: Mapping[str, Any]
    inputs: tuple[RunInput, ...]


def inputs_of(path: Path, manifest: Mapping[str, Any]) -> tuple[RunInput, ...]:
    """What a run was given, with the runs that made it."""
    found = manifest.get("inputs")
    entries = [e for e in found if isinstance(e, dict)] if isinstance(found, list) else []
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
    """The run that a reference names, from here or, where runs were moved, from a run beside it."""
    named = Path(reference)
    if not reference or "\0" in reference:
        return None
    with suppress(RuntimeError):  # of a user whom this machine does not know
        named = named.expanduser()
    beside = near.absolute().parent
    places = (named, beside / named, beside / named.name, beside / named.parent.name)
    for place in places:
        folder = place.parent if place.name in OWN_FOLDERS else place
        is_itself = folder.absolute() == near.absolute()
        if not is_itself and is_llmctl_manifest(read_json(folder / "manifest.json")):
            return folder
    return None


def lineage_of(path: Path, manifest: Mapping[str, Any]) -> list[LineageStep]:
    """The run and those it stands on, the eldest first, each once."""
    return list(_walk(path, manifest, set()))


def portable(word: str) -> str:
    """A word of a command without the folders of this machine: `--data=/home/me/a` as `--data=…/a`.

    What lies under the current directory keeps its relative path.
    """
    here = f"{Path.cwd()}/"
    return _FOLDERS_BEFORE.sub(r"\1…/", word.replace(here, "")) if "/" in word else word


def _walk(path: Path, manifest: Mapping[str, Any], seen: set[Path]) -> Iterator[LineageStep]:
    seen.add(path.resolve())
    inputs = inputs_of(path, manifest)
    for one in inputs:
        if one.run is not None and one.run.resolve() not in seen:
            yield from _walk(one.run, read_json(one.run / "manifest.json"), seen)
    yield LineageStep(path, manifest, inputs)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None

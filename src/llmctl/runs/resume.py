"""Choose the checkpoint that a run resumes from: the newest that is whole and its own; load it.

In: the checkpoints that `checkpoint.save` wrote. Out: a valid one, or an error that names the file
and the reason.
"""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from llmctl.config.sections import Resumable
from llmctl.console import log
from llmctl.errors import ModelError, UserError
from llmctl.files import sha256_file
from llmctl.runs.checkpoint import (
    MANIFEST,
    PREFIX,
    CheckpointContent,
    Owner,
    manifest_of,
    newest_first,
    run_of,
    step_of,
)
from llmctl.runs.directory import read_manifest

FIXED = ("architecture", "world_size")
"""Settings that no run may change half-way: the state of every weight and rank depends on them."""
SHA256_DIGITS = 64
FOLDER = "checkpoints"
"""Where a run keeps them."""

FOREIGN = "it is of another run"
DERIVED = {"max_steps": ("warmup", "decay")}
"""Settings that follow from another, and may differ where that one may."""


def newest_valid(root: Path, run_id: str | None) -> tuple[Path | None, frozenset[int]]:
    """Find this run's newest valid checkpoint, and the steps of its damaged ones that are newer.

    Logs which ones it passes over and why. One whose best checkpoint is lost is passed over too: it
    could not end as the uninterrupted run does. None where there is no checkpoint at all.

    Raises:
        ModelError: there are checkpoints, and none is valid.
    """
    checkpoints, damaged = newest_first(root), set[int]()
    for path in checkpoints:
        reason = defect(path, run_id)
        if reason is not None and reason != FOREIGN:
            damaged.add(step_of(path))
        if reason is None and (best := lost_best(path)):
            reason = f"the best checkpoint, {best}"
        if reason is None:
            return path, frozenset(damaged)
        log.warning("passing over %s: %s", path, reason)
    if checkpoints:
        raise ModelError(
            "no valid checkpoint here",
            file=root,
            hint="nothing was deleted; --resume-from PATH takes one, --overwrite starts anew",
        )
    return None, frozenset()


def defect(path: Path, run_id: str | None = None) -> str | None:
    """Find what is wrong with a checkpoint (of this run, if one is given); None if nothing is."""
    try:
        manifest = manifest_of(path)
    except (FileNotFoundError, NotADirectoryError):
        return f"{MANIFEST} is missing"
    except ValueError:
        return f"{MANIFEST} is damaged"
    if run_id is not None and manifest["run_id"] != run_id:
        return FOREIGN
    if path.name != f"{PREFIX}{manifest['step']}":
        return f"{MANIFEST} is of step {manifest['step']}"
    for name, expected in manifest["files"].items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, not {expected['bytes']}"
        if sha256_file(file) != expected["sha256"]:
            return f"{name} is damaged (its sha256 differs)"
    return None


def lost_best(path: Path) -> str | None:
    """Find name and defect of the best checkpoint that a valid checkpoint refers to; else None."""
    best = manifest_of(path)["best"]
    if best is None or best == step_of(path):
        return None
    other = path.with_name(f"{PREFIX}{best}")
    reason = defect(other, run_of(path))
    return None if reason is None else f"{other.name}: {reason}"


def require_same(path: Path, owner: Owner, allow: Collection[str] = ()) -> dict[str, Any]:
    """Refuse a checkpoint of a run that differs from this one in more than what is allowed.

    Returns:
        name -> [then, now] of what differs and may.

    Raises:
        ModelError: something else differs; it is named, with both values.
        UserError: `allow` names a setting that no run has, or may change.
    """
    saved, wanted = manifest_of(path)["identity"], json.loads(json.dumps(owner.identity))
    for name in allow:
        if name not in wanted or name in FIXED:
            free = ", ".join(sorted(set(wanted) - set(FIXED)))
            raise UserError(
                f"--resume-allow {name}: no run can change that half-way", hint=f"allowed: {free}"
            )
    allowed = {*allow, *(derived for name in allow for derived in DERIVED.get(name, ()))}
    different = {
        name: [saved.get(name), wanted.get(name)]
        for name in sorted({*saved, *wanted})
        if saved.get(name) != wanted.get(name)
    }
    if refused := [name for name in different if name not in allowed]:
        changes = ", ".join(_change(name, *different[name]) for name in refused)
        fixed = set(FIXED) & set(refused)
        raise ModelError(
            f"this checkpoint is of a run that differs ({changes})",
            file=path,
            hint="resume with the same recipe, data and processes, or start a new run"
            + ("" if fixed else f"; --resume-allow {','.join(refused)} insists"),
        )
    return different


def named_checkpoint(path: Path) -> Path:
    """Return the checkpoint that `--resume-from` names: itself, or the newest valid one of a run.

    Raises:
        ModelError: a run without a checkpoint, or without a valid one.
    """
    run = _run_folder(path)
    if run is None:
        return path
    newest, _ = newest_valid(run / FOLDER, read_manifest(run).get("run_id"))
    if newest is None:
        raise ModelError("this run has no checkpoint", file=path, hint="leave out --resume-from")
    return newest


def _run_folder(path: Path) -> Path | None:
    """Return the run that a path names, by itself or by its folder of checkpoints; else None."""
    if path.name == FOLDER and path.is_dir():
        return path.parent
    is_run = (path / FOLDER).is_dir() or (path / "status.json").is_file()
    return path if is_run else None


def earlier_manifest(config: Resumable) -> dict[str, Any]:
    """Read the manifest of the run that is resumed, empty where none is."""
    if config.resume and config.out is not None and (config.out / FOLDER).is_dir():
        return read_manifest(config.out)
    if config.resume_from is None:
        return {}
    return read_manifest(_run_folder(config.resume_from) or config.resume_from.parent.parent)


def load(path: Path, rank: int = 0) -> CheckpointContent:
    """Load a checkpoint that `defect` found nothing wrong with."""
    manifest = manifest_of(path)
    return CheckpointContent(
        step=manifest["step"],
        model=_read(path / "model.safetensors"),
        optimizer=_read(path / "optimizer.safetensors"),
        rng=_read(path / f"rng-{rank}.safetensors"),
        state=json.loads((path / "state.json").read_bytes()),
        best=manifest["best"],
    )


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """Load only the weights of a checkpoint of this run; raise a ModelError if it is damaged."""
    if reason := defect(path):
        raise ModelError(f"not a valid checkpoint: {reason}", file=path)
    return _read(path / "model.safetensors")


def _read(file: Path) -> dict[str, torch.Tensor]:
    """Load and copy tensors: mapped ones would keep a deleted checkpoint on the disk."""
    return {name: tensor.clone() for name, tensor in load_file(file).items()}


def _change(name: str, then: Any, now: Any) -> str:
    """Format a change: `lr: 0.1 -> 0.2`; of a mapping what differs, of a hash its beginning."""
    if all(isinstance(value, str) and len(value) == SHA256_DIGITS for value in (then, now)):
        return f"{name}: {then[:8]}… -> {now[:8]}…"
    if not (isinstance(then, dict) and isinstance(now, dict)):
        return f"{name}: {then} -> {now}"
    keys = (key for key in sorted({*then, *now}) if then.get(key) != now.get(key))
    return ", ".join(f"{key}: {then.get(key)} -> {now.get(key)}" for key in keys)

"""Checkpoints that survive a kill at any instant.

    checkpoints/checkpoint-N/
      model.safetensors       weights
      optimizer.safetensors   optimizer tensors
      rng-RANK.safetensors    random generators of each rank
      state.json              what is no tensor: step, best loss, optimizer scalars
      manifest.json           written last: step, identity, and size and sha256 of every file

A checkpoint is filled under a temporary name, each file fsynced, the manifest last; then renamed,
and the folder that holds it fsynced. Only then are older ones deleted. No pickle is ever written.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from llmctl.console import log
from llmctl.errors import ModelError
from llmctl.files import follow_umask, no_space, sha256_file

MANIFEST = "manifest.json"
PREFIX = "checkpoint-"
STAGED = ".tmp-"
DOOMED = ".trash-"


@dataclass(frozen=True)
class Content:
    """What a checkpoint holds. Tensors of rank 0 matter, but for `rng`, which every rank has."""

    step: int
    model: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, torch.Tensor]
    rng: Mapping[str, torch.Tensor]
    state: Mapping[str, Any]


def save(
    root: Path,
    content: Content,
    identity: Mapping[str, Any],
    *,
    rank: int = 0,
    barrier: Callable[[], None] = lambda: None,
) -> Path:
    """Write `root/checkpoint-STEP`, whole or not at all; every rank calls it.

    Args:
        root: the run's checkpoints/ folder.
        content: what to write.
        identity: what a run must share with this one to resume from it.
        rank: this process's; rank 0 writes all but the others' generators.
        barrier: waits for all ranks.

    Raises:
        ResourceError: no space is left; nothing is left behind.
    """
    final = root / f"{PREFIX}{content.step}"
    staging = root / f"{STAGED}{final.name}"
    if rank == 0:
        shutil.rmtree(staging, ignore_errors=True)
        _require_space(root, content)
        staging.mkdir(parents=True)
    barrier()
    try:
        _write_tensors(staging / f"rng-{rank}.safetensors", content.rng)
        if rank == 0:
            _write_tensors(staging / "model.safetensors", content.model)
            _write_tensors(staging / "optimizer.safetensors", content.optimizer)
            _write_json(staging / "state.json", content.state)
        barrier()
        if rank == 0:
            _commit(staging, final, content.step, identity)
    except (OSError, SafetensorError):
        shutil.rmtree(staging, ignore_errors=True)
        raise
    barrier()
    return final


def rotate(root: Path, keep: int, best: int | None) -> None:
    """Delete all but the newest `keep` (at least two) checkpoints and the best one."""
    found = _newest_first(root)
    for path in found[max(2, keep) :]:
        if _step(path) != best:
            doomed = path.rename(path.with_name(DOOMED + path.name))
            shutil.rmtree(doomed)


def clean(root: Path) -> None:
    """Remove what a killed process left half-written or half-deleted."""
    for pattern in (f"{STAGED}*", f"{DOOMED}*"):
        for path in root.glob(pattern):
            shutil.rmtree(path)


def newest(root: Path) -> Path | None:
    """The newest valid checkpoint; says which ones it passed over and why; None without any.

    Raises:
        ModelError: there are checkpoints, and none is valid.
    """
    found = _newest_first(root)
    for path in found:
        reason = defect(path)
        if reason is None:
            return path
        log.warning("passing over %s: %s", path, reason)
    if found:
        raise ModelError(
            "no valid checkpoint here",
            file=root,
            hint="nothing was deleted; --overwrite starts anew",
        )
    return None


def defect(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        files, world_size = manifest["files"], manifest["identity"]["world_size"]
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST} is damaged"
    needed = {"model.safetensors", "optimizer.safetensors", "state.json"}
    needed |= {f"rng-{rank}.safetensors" for rank in range(world_size)}
    if absent := sorted(needed - set(files)):
        return f"{absent[0]} is not in its manifest"
    for name, facts in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != facts["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, not {facts['bytes']}"
        if sha256_file(file) != facts["sha256"]:
            return f"{name} is damaged (its sha256 differs)"
    return None


def load(path: Path, identity: Mapping[str, Any], rank: int = 0) -> Content:
    """Read a checkpoint that `defect` found nothing wrong with.

    Raises:
        ModelError: it is damaged, or belongs to a run that differs.
    """
    if reason := defect(path):
        raise ModelError(f"not a valid checkpoint: {reason}", file=path)
    manifest = json.loads((path / MANIFEST).read_bytes())
    _require_same(path, manifest["identity"], json.loads(json.dumps(identity)))
    return Content(
        step=manifest["step"],
        model=load_file(path / "model.safetensors"),
        optimizer=load_file(path / "optimizer.safetensors"),
        rng=load_file(path / f"rng-{rank}.safetensors"),
        state=json.loads((path / "state.json").read_bytes()),
    )


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """Only the weights of a checkpoint of this run.

    Raises:
        ModelError: it is damaged.
    """
    if reason := defect(path):
        raise ModelError(f"not a valid checkpoint: {reason}", file=path)
    return load_file(path / "model.safetensors")


def _require_same(path: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    different = [k for k in sorted({*saved, *wanted}) if saved.get(k) != wanted.get(k)]
    if different:
        changes = ", ".join(f"{k}: {saved.get(k)} -> {wanted.get(k)}" for k in different)
        raise ModelError(
            f"this checkpoint is of a run that differs ({changes})",
            file=path,
            hint="resume with the same recipe, data and processes, or start a new run",
        )


def _commit(staging: Path, final: Path, step: int, identity: Mapping[str, Any]) -> None:
    follow_umask(staging)
    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
        for file in sorted(staging.iterdir())
    }
    _write_json(staging / MANIFEST, {"step": step, "identity": identity, "files": files})
    _fsync(staging)
    if final.exists():  # a damaged one that resume passed over
        shutil.rmtree(final)
    staging.rename(final)
    _fsync(final.parent)


def _require_space(root: Path, content: Content) -> None:
    tensors = [*content.model.values(), *content.optimizer.values()]
    needed = sum(t.numel() * t.element_size() for t in tensors) + 1_000_000
    root.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(root).free < needed:
        raise no_space(root, needed)


def _write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    _fsync(path)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    with path.open("w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _newest_first(root: Path) -> list[Path]:
    found = [p for p in root.glob(f"{PREFIX}*") if p.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.name.removeprefix(PREFIX))

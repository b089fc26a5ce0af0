"""Write checkpoints that survive a kill at any instant.

    checkpoints/checkpoint-N/
      model.safetensors       weights that train, and buffers
      optimizer.safetensors   optimizer tensors
      rng-RANK.safetensors    random generators of each rank
      state.json              all that is no tensor: progress, scheduler, optimizer scalars
      manifest.json           written last: step, run, identity, and size and sha256 of every file

A checkpoint is filled under a temporary name, each file fsynced, the manifest last; then renamed,
and the folder that holds it fsynced. Only then are older ones deleted, under yet another name. At
every instant the folder holds each checkpoint whole or not at all. No pickle is ever written.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from llmctl.errors import UserError
from llmctl.files import follow_umask, fsync, no_space, sha256_file, writing

MANIFEST = "manifest.json"
PREFIX = "checkpoint-"
STAGED = ".tmp-"
DOOMED = ".trash-"
LEAST = 2
"""Checkpoints kept at least: the newest may be the one that a failing disk damages."""


def _nothing(event: str, path: Path) -> None:
    pass


fault: Callable[[str, Path], None] = _nothing
"""Called after every write, fsync, rename and delete; tests crash here."""


@dataclass(frozen=True)
class CheckpointContent:
    """Content of a checkpoint. Only rank 0's is written, but for `rng`, which every rank has."""

    step: int
    model: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, torch.Tensor]
    rng: Mapping[str, torch.Tensor]
    state: Mapping[str, Any]
    best: int | None = None
    """Step of the checkpoint with the best validation loss, which a resumed run needs as well."""


@dataclass(frozen=True)
class Owner:
    """The run that checkpoints belong to, and the settings that a resumed run must share."""

    run_id: str | None
    identity: Mapping[str, Any]


def save(
    root: Path,
    content: CheckpointContent,
    owner: Owner,
    *,
    rank: int = 0,
    together: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Path:
    """Write `root/checkpoint-STEP`, whole or not at all; every rank calls it.

    `together` ends when all ranks are done, and fails on all if it fails on one.

    Raises:
        ResourceError: no space is left; nothing is left behind.
    """
    final = root / f"{PREFIX}{content.step}"
    staging = root / f"{STAGED}{final.name}"
    try:
        with together(), writing(root):
            if rank == 0:
                _prepare(root, staging, size(content))
        with together(), writing(root):
            _write_tensors(staging / f"rng-{rank}.safetensors", content.rng)
            if rank == 0:
                _write_tensors(staging / "model.safetensors", content.model)
                _write_tensors(staging / "optimizer.safetensors", content.optimizer)
                _write_json(staging / "state.json", content.state)
        with together(), writing(root):
            if rank == 0:
                _commit(staging, final, content, owner)
    except (OSError, SafetensorError, UserError):
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return final


def rotate(
    root: Path, keep: int, *, step: int, run_id: str | None, damaged: Collection[int] = ()
) -> None:
    """After saving `step`, delete checkpoints that this run no longer needs.

    Kept are the newest `keep` (at least two) checkpoints, and the best one that each of them refers
    to: whichever of them a run resumes from, it ends with the same result. Later ones than `step`
    are of a branch that `--resume-from` left. Another run's are not touched.

    `damaged` are steps of checkpoints that resume passed over; they are deleted.
    """
    broken = [path for path in newest_first(root) if step_of(path) in damaged]
    mine = [p for p in newest_first(root) if run_of(p) == run_id and p not in broken]
    kept = [path for path in mine if step_of(path) <= step][: max(LEAST, keep)]
    needed = {step_of(path) for path in kept} | {manifest_of(path)["best"] for path in kept}
    for path in (*broken, *(p for p in mine if step_of(p) not in needed)):
        _delete(path)


def clean(root: Path) -> None:
    """Remove what a killed process left half-written or half-deleted."""
    for pattern in (f"{STAGED}*", f"{DOOMED}*"):
        for path in root.glob(pattern):
            shutil.rmtree(path)
            fault("delete", path)


def size(content: CheckpointContent) -> int:
    """Estimate the bytes of a checkpoint."""
    tensors = [*content.model.values(), *content.optimizer.values()]
    return sum(t.numel() * t.element_size() for t in tensors) + 1_000_000


def require_space(root: Path, needed: int) -> None:
    """Raise a ResourceError where fewer bytes are free on the disk than needed."""
    if shutil.disk_usage(root).free < needed:
        raise no_space(root, needed)


def _prepare(root: Path, staging: Path, needed: int) -> None:
    shutil.rmtree(staging, ignore_errors=True)
    if not root.exists():
        root.mkdir()  # not its parents: a run directory that was deleted stays so
        _fsync(root.parent)
    require_space(root, needed)
    staging.mkdir()


def _commit(staging: Path, final: Path, content: CheckpointContent, owner: Owner) -> None:
    follow_umask(staging)
    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
        for file in sorted(staging.iterdir())
    }
    manifest = {
        "step": content.step,
        "best": content.best,
        "run_id": owner.run_id,
        "identity": json.loads(json.dumps(owner.identity)),
        "files": files,
    }
    _write_json(staging / MANIFEST, {**manifest, "sha256": seal(manifest)})
    _fsync(staging)
    if final.exists():  # a damaged one that resume passed over, or one of a branch that was left
        _delete(final)
    staging.rename(final)
    fault("rename", final)
    _fsync(final.parent)


def _delete(path: Path) -> None:
    """Delete a checkpoint under another name, so that half of it is never taken for one."""
    doomed = path.with_name(DOOMED + path.name)
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    fault("rename", doomed)
    shutil.rmtree(doomed)
    fault("delete", doomed)


def _write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    fault("write", path)
    _fsync(path)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1))
    fault("write", path)
    _fsync(path)


def _fsync(path: Path) -> None:
    fsync(path)
    fault("fsync", path)


def manifest_of(path: Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not as it was written.
    """
    manifest = json.loads((path / MANIFEST).read_bytes())
    if not isinstance(manifest, dict) or manifest.pop("sha256", None) != seal(manifest):
        raise ValueError("damaged")
    return manifest


def seal(manifest: Mapping[str, Any]) -> str:
    """Hash a manifest, which has the hashes of all other files."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def run_of(path: Path) -> str | None:
    """Return the id of the run that wrote a checkpoint; empty if it cannot be read."""
    try:
        return manifest_of(path)["run_id"]  # type: ignore[no-any-return]
    except (OSError, ValueError):
        return ""


def newest_first(root: Path) -> list[Path]:
    """List the folders with a checkpoint's name, the highest step first."""
    folders = [p for p in root.glob(f"{PREFIX}*") if p.name.removeprefix(PREFIX).isdigit()]
    return sorted(folders, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """Read the step in a checkpoint's name."""
    return int(path.name.removeprefix(PREFIX))

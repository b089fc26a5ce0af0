"""Read and write what commands leave and take: JSON lines, metrics, manifests, runs cut off."""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from llmctl.files import sha256_file

RESULTS = ("model", "adapter", "value_model")
"""Folders of a run that hold what it ended with."""


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write JSON lines; their path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_texts(path: Path, texts: Iterable[str]) -> Path:
    """Write texts as JSON lines; their path."""
    return write_rows(path, ({"text": text} for text in texts))


def rows_in(text: str) -> list[Any]:
    """What JSON lines hold, such as those on stdout."""
    return [json.loads(line) for line in text.splitlines()]


def read_rows(path: Path) -> list[Any]:
    """What a file of JSON lines holds."""
    return rows_in(path.read_text())


def metrics(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The lines of a log of a run."""
    return read_rows(Path(run) / name)


def logged(run: Path, *names: str) -> list[Any]:
    """Each of these figures wherever a run logged it, one figure after the other."""
    return [row[name] for name in names for row in metrics(run) if name in row]


def policy_steps(run: Path) -> list[dict[str, Any]]:
    """The lines of steps of PPO, which have a KL."""
    return [line for line in metrics(run) if "kl" in line]


def manifest(run: Path) -> dict[str, Any]:
    return json.loads((Path(run) / "manifest.json").read_text())


def digest(run: Path, name: str = "model/model.safetensors") -> str:
    """Hash of a file of a run: whether two ended in the same bits."""
    return sha256_file(run / name)


def cut_off(whole: Path, to: Path, after: int | None = None) -> Path:
    """Copy a run as a kill would have left it, where given after the checkpoint of a step."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(whole, to)
    for result in RESULTS:
        shutil.rmtree(to / result, ignore_errors=True)
    (to / "status.json").write_text('{"state": "running"}')
    if after is not None:
        for path in (to / "checkpoints").iterdir():
            if int(path.name.split("-")[1]) > after:
                shutil.rmtree(path)
    return to


def edit_json(file: Path, **changes: Any) -> None:
    """Change some keys of an object in a file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_tensors(
    file: Path,
    change: Callable[[dict[str, Any]], object],
    whole: Mapping[str, Any] | None = None,
) -> None:
    """Change the tensors of a file, or write those of `whole` changed; its header is kept."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file) if whole is None else dict(whole)
    change(tensors)
    save_file(tensors, file, metadata=metadata)

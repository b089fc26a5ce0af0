"""Cores, memory and disks."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
from huggingface_hub import constants
from rich.filesize import decimal

from llmctl.checkup.finding import Finding
from llmctl.errors import OutputError

FEW_BYTES = 10 * 10**9
"""Of disk: less than a model of a billion parameters and two checkpoints of its training take."""
TOO_FEW_BYTES = 10**9
LITTLE_MEMORY = 4 * 10**9
TOO_LITTLE_MEMORY = 10**9
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def check_threads(usable: int) -> Finding:
    """Cores that this process may use, and what the environment says of threads.

    More threads than cores slow small models ten- to twentyfold.
    """
    there = os.cpu_count() or 1
    text = f"{usable} of {there} cores usable" if usable < there else f"{usable} cores"
    for name in THREADS:
        value = os.environ.get(name, "")
        if value and not value.isdigit():
            return Finding("threads", "warning", f"{text}; {name}={value}", f"unset {name}")
        if value and int(value) > usable:
            text += f"; {name}={value} is more than that, and slows down what uses it"
            return Finding("threads", "warning", text, f"export {name}={usable}, or unset it")
        if value:
            text += f"; {name}={value}, where llmctl chooses for itself"
    return Finding("threads", "ok", text)


def check_memory(left: int) -> Finding:
    """Memory that this process may still take, by its cgroups as well.

    Args:
        left: bytes.
    """
    text = f"{decimal(left)} free of {decimal(psutil.virtual_memory().total)}"
    fix = "end other programs, raise the container's limit, or take smaller models"
    if left < TOO_LITTLE_MEMORY:
        return Finding("memory", "failure", text, fix)
    if left < LITTLE_MEMORY:
        return Finding("memory", "warning", text, fix)
    return Finding("memory", "ok", text)


def check_disks() -> Iterator[Finding]:
    """Where runs and downloads go: room, and whether one may write there."""
    yield _disk("directory", Path.cwd(), "go to a directory of yours, or pass -o elsewhere")
    cache = Path(constants.HF_HUB_CACHE)
    yield _disk("cache", cache, "export HF_HOME=DIRECTORY, on a disk where you may write")


def _disk(name: str, folder: Path, elsewhere: str) -> Finding:
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    text = f"{folder}: {decimal(free)} free"
    if not _can_write(there):
        return Finding(name, "failure", f"{folder}: not to be written", elsewhere, OutputError)
    if free < TOO_FEW_BYTES:
        return Finding(name, "failure", text, f"free some space, or {elsewhere}")
    if free < FEW_BYTES:
        return Finding(name, "warning", text, f"free some space, or {elsewhere}")
    return Finding(name, "ok", text)


def _can_write(folder: Path) -> bool:
    """Whether a file can be made there; permissions alone do not tell of a read-only disk."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False

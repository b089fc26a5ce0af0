"""Check cores, memory and disks."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
from huggingface_hub import constants

from llmctl.checkup import CheckResult
from llmctl.errors import OutputError
from llmctl.numbers import byte_size, counted

LOW_DISK = 10 * 10**9
"""Bytes: a model of a billion parameters and two checkpoints of its training take more."""
MIN_DISK = 10**9
LOW_MEMORY = 4 * 10**9
MIN_MEMORY = 10**9
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def check_threads(usable: int) -> CheckResult:
    """Check the cores that this process may use, and the environment's numbers of threads.

    More threads than cores slow small models ten- to twentyfold.
    """
    cores = os.cpu_count() or 1
    text = f"{usable} of {cores} cores usable" if usable < cores else counted(usable, "core")
    for name in THREADS:
        value = os.environ.get(name, "")
        if value and not value.isdigit():
            return CheckResult("threads", "warning", f"{text}; {name}={value}", f"unset {name}")
        if value and int(value) > usable:
            text += f"; {name}={value} is more than that, and slows down what uses it"
            return CheckResult("threads", "warning", text, f"export {name}={usable}, or unset it")
        if value:
            text += f"; {name}={value}, where llmctl chooses for itself"
    return CheckResult("threads", "ok", text)


def check_memory(left: int) -> CheckResult:
    """Check the bytes of memory that this process may still take, by its cgroups as well."""
    text = f"{byte_size(left)} free of {byte_size(psutil.virtual_memory().total)}"
    fix = "end other programs, raise the container's limit, or take smaller models"
    return _by_room("memory", left, (MIN_MEMORY, LOW_MEMORY), text, fix)


def check_disks() -> Iterator[CheckResult]:
    """Check room and permissions where runs and downloads go."""
    yield _disk("directory", Path.cwd(), "go to a directory of yours, or pass -o elsewhere")
    cache = Path(constants.HF_HUB_CACHE)
    yield _disk("cache", cache, "export HF_HOME=DIRECTORY, on a disk where you may write")


def _disk(name: str, folder: Path, elsewhere: str) -> CheckResult:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    text = f"{folder}: {byte_size(free)} free"
    if not _can_write(existing):
        return CheckResult(name, "failure", f"{folder}: not to be written", elsewhere, OutputError)
    return _by_room(name, free, (MIN_DISK, LOW_DISK), text, f"free some space, or {elsewhere}")


def _by_room(name: str, free: int, few: tuple[int, int], text: str, fix: str) -> CheckResult:
    """Fail below the first of these numbers of bytes, and warn below the second."""
    if free >= few[1]:
        return CheckResult(name, "ok", text)
    return CheckResult(name, "failure" if free < few[0] else "warning", text, fix)


def _can_write(folder: Path) -> bool:
    """Whether a file can be made; permissions alone do not tell of a read-only disk."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False

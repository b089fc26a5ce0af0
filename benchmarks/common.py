"""What the benchmarks share: the machine's line, processes timed from outside, a table."""

import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from llmctl.hardware import device_name, usable_cores

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}


def machine(*packages: str, device: str = "cpu") -> str:
    """One line that says what was measured on, and with which versions."""
    versions = [f"{name} {version(name)}" for name in packages or ("torch", "transformers")]
    parts = [device_name(device), f"{usable_cores()} cores", f"Python {platform.python_version()}"]
    return ", ".join([*parts, *versions])


def seconds(command: Sequence[object], folder: Path | None = None) -> float:
    """Wall time of a whole process, start and imports included."""
    return timed(command, folder)[0]


def timed(command: Sequence[object], folder: Path | None = None) -> tuple[float, str]:
    """Wall time of a whole process, start and imports included, and what it printed."""
    started = time.perf_counter()
    ran = subprocess.run(
        [str(part) for part in command], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True
    )
    taken = time.perf_counter() - started
    if ran.returncode:
        raise SystemExit(f"{command}\n{ran.stdout[-2000:]}\n{ran.stderr[-2000:]}")
    return taken, ran.stdout


@dataclass(frozen=True)
class Measured:
    """What a whole process took, start and imports included."""

    seconds: float
    cpu_seconds: float
    """Of the process and its children; other work on the machine moves it less than wall time."""
    peak: float
    """MB that the largest of them held."""


def measured(command: Sequence[str], threads: int) -> Measured:
    """Run a whole process with its children."""
    environment = {**ENVIRONMENT, "OMP_NUM_THREADS": str(threads)}
    started = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        taken = time.perf_counter() - started
        if status:
            said.seek(0)
            raise SystemExit(f"{command}\n{said.read().decode()[-3000:]}")
    return Measured(taken, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def alternate(sides: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Measure the sides in turn, round after round."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, measure in sides.items():
            found[name].append(measure())
    return found


def ratio(a: list[float], b: list[float]) -> float:
    """Median of the ratios a/b, round by round, which a drifting machine does not move."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def show(values: list[float], digits: int = 2) -> str:
    """Median, and the range behind it."""
    middle = statistics.median(values)
    return f"{middle:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"

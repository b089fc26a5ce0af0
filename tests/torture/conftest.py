"""What the torture tests share: a seed, uninterrupted runs to compare with, a tally, no orphans.

TORTURE=long runs the long form, TORTURE_SEED repeats one.
"""

import os
import random
import shutil
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from llmctl.files import sha256_file
from torture import harness
from torture.subjects import Subject

LONG = os.environ.get("TORTURE") == "long"
SEED = int(os.environ.get("TORTURE_SEED") or random.SystemRandom().randrange(10**6))
COLUMNS = ("tried", "inside a save", "survived", "bit-identical")
counts: dict[tuple[str, str], Counter] = {}


def tally(group: str, subject: Subject | str, *columns: str) -> None:
    """Count a trial in the table that the suite ends with."""
    name = subject if isinstance(subject, str) else subject.name
    counts.setdefault((group, name), Counter()).update(columns)


def pytest_terminal_summary(terminalreporter) -> None:
    if not counts:
        return
    write = terminalreporter.write_line
    write("")
    write(f"torture: seed {SEED} ({'long' if LONG else 'short'} form)")
    write("")
    write("| what is done to a run | command | " + " | ".join(COLUMNS) + " |")
    write("|---|---|" + "---:|" * len(COLUMNS))
    for (group, subject), row in counts.items():
        cells = [str(row[column]) if row[column] else "" for column in COLUMNS]
        write(f"| {group} | {subject} | " + " | ".join(cells) + " |")


@pytest.fixture
def draw(request) -> random.Random:
    """Random numbers that the seed and the test's name decide."""
    return random.Random(f"{SEED} {request.node.nodeid}")


@dataclass(frozen=True)
class Reference:
    """A run that nothing disturbed."""

    path: Path
    seconds: float
    save_seconds: float

    @property
    def digest(self) -> str:
        return digest(self.path)

    def matches(self, run: Path) -> bool:
        return digest(run) == self.digest


def digest(run: Path) -> str:
    """sha256 of the weights a run ended with."""
    return sha256_file(run / "model" / "model.safetensors")


@pytest.fixture(scope="session", autouse=True)
def _server(tmp_path_factory):
    """The process that has imported what is heavy; at the end, nothing may still run."""
    harness.warm_up(tmp_path_factory.mktemp("server"))
    yield
    left = harness.end_all()
    assert not left, f"processes outlived their tests: {left}"


@pytest.fixture
def run(tokens, tmp_path):
    """Start a subject: `run(subject, size, out, *flags, plant=…)` -> a Trial."""

    def start(subject: Subject, size: str, out: Path, *flags: object, **options) -> harness.Trial:
        command = subject.command(tokens, size, out, *flags)
        return harness.start(subject.entry, command, tmp_path / "logs", **options)

    return start


@pytest.fixture(scope="session")
def reference(tokens, tmp_path_factory):
    """`reference(subject, size, *flags)`: the same run undisturbed, made once."""
    made: dict[tuple[object, ...], Reference] = {}

    def get(subject: Subject, size: str, *flags: object) -> Reference:
        key = (subject.name, size, *flags)
        if key not in made:
            out = tmp_path_factory.mktemp(f"reference-{subject.name}-{size}") / "run"
            command = subject.command(tokens, size, out, *flags)
            made[key] = _undisturbed(subject, command, out)
        return made[key]

    return get


def _undisturbed(subject: Subject, command: tuple[object, ...], out: Path) -> Reference:
    begun = time.monotonic()
    trial = harness.start(subject.entry, command, out.parent / "logs")
    saving, samples = 0, 0
    while trial.code is None:
        assert time.monotonic() - begun < harness.LIMIT
        samples += 1
        saving += bool(harness.unfinished(out))
        time.sleep(0.001)
    seconds = time.monotonic() - begun
    assert trial.code == 0, trial.err
    saves = max(1, int(command[command.index("--max-steps") + 1]))
    return Reference(out, seconds, seconds * saving / samples / saves)


@pytest.fixture
def copy_of(tmp_path):
    """A copy of a finished run that looks as if it had been cut off."""

    def make(finished: Path, name: str = "run") -> Path:
        out = tmp_path / name
        shutil.copytree(finished, out)
        shutil.rmtree(out / "model")
        (out / "status.json").write_text('{"state": "running"}')
        return out

    return make

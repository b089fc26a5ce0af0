"""What the torture tests share: a seed, uninterrupted runs to compare with, a tally, no orphans.

TORTURE=long runs the long form, TORTURE_SEED repeats one.
"""

import json
import os
import random
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from llmctl.files import sha256_file
from llmctl.runs.cards import CARD
from tests.run_files import RESULTS, cut_off
from tests.torture import harness
from tests.torture.subjects import LONG, Subject

os.environ.setdefault("TORTURE_SEED", str(random.SystemRandom().randrange(10**6)))
SEED = int(os.environ["TORTURE_SEED"])
"""Of all workers: they inherit the environment."""
COLUMNS = ("tried", "inside a save", "survived", "bit-identical")
LOGS = ("metrics.jsonl", "samples.jsonl")
CLOCK = (
    *("time", "tokens_per_second", "mfu", "memory_bytes"),
    *("rollout_seconds", "update_seconds", "episodes_per_second"),
)
counts: dict[tuple[str, str], Counter] = {}


def tally(group: str, subject: Subject | str, *columns: str) -> None:
    """Count a trial in the table that the suite ends with."""
    name = subject if isinstance(subject, str) else subject.name
    counts.setdefault((group, name), Counter()).update(columns)


def pytest_sessionfinish(session) -> None:
    """Have a worker hand its counts to the process that prints the table."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["torture"] = [[*key, dict(row)] for key, row in counts.items()]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    for group, subject, row in getattr(node, "workeroutput", {}).get("torture", []):
        counts.setdefault((group, subject), Counter()).update(row)


def pytest_terminal_summary(terminalreporter) -> None:
    if not counts:
        return
    write = terminalreporter.write_line
    write("")
    write(f"torture: seed {SEED} ({'long' if LONG else 'short'} form)")
    write("")
    write("| what is done to a run | command | " + " | ".join(COLUMNS) + " |")
    write("|---|---|" + "---:|" * len(COLUMNS))
    for (group, subject), row in sorted(counts.items()):
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

    def matches(self, run: Path) -> bool:
        return differences(outcome(self.path), outcome(run)) == []


def outcome(run: Path) -> dict[str, Any]:
    """What a run ended with: sha256 of each file of its result, and its lines but for the clock.

    A model's card is no part of it: it tells the command, the time and the energy that it took.
    """
    files = (p for name in RESULTS for p in (run / name).rglob("*") if p.is_file())
    results = [p for p in files if p.name != CARD]
    found: dict[str, Any] = {str(p.relative_to(run)): sha256_file(p) for p in results}
    assert any(name.endswith(".safetensors") for name in found), "no result"
    for log in LOGS:
        if (run / log).exists():
            lines = (json.loads(line) for line in (run / log).read_text().splitlines())
            found[log] = [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]
    return found


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Which files are not the same; pytest shows what is printed where a test fails."""
    names = sorted(n for n in {*ours, *theirs} if ours.get(n) != theirs.get(n))
    for name in names:
        print(f"{name}: {ours.get(name)} -> {theirs.get(name)}")
    return names


@pytest.fixture(scope="session", autouse=True)
def _server(request):
    """The process that has imported what is heavy; at the end, nothing may still run."""
    if any("slow" in item.keywords for item in request.session.items):
        harness.warm_up()
    yield
    left = harness.end_all()
    assert not left, f"processes outlived their tests: {left}"


@pytest.fixture
def run(tokens, tmp_path):
    """Start a subject: `run(subject, size, out, *flags, plant=…)` -> a Trial."""

    def start(subject: Subject, size: str, out: Path, *flags: object, **options) -> harness.Trial:
        command = subject.command(tokens, size, out, *flags)
        return harness.start(command, tmp_path / "logs", **options)

    return start


@pytest.fixture(scope="session")
def reference(tokens, tmp_path_factory):
    """`reference(subject, size, *flags)`: the same run undisturbed, made once."""
    made: dict[tuple[object, ...], Reference] = {}

    def get(subject: Subject, size: str, *flags: object) -> Reference:
        key = (subject.name, size, *flags)
        if key not in made:
            out = tmp_path_factory.mktemp("reference") / "run"
            command = subject.command(tokens, size, out, *flags)
            made[key] = _undisturbed(command, out)
        return made[key]

    return get


def _undisturbed(command: tuple[object, ...], out: Path) -> Reference:
    trial = harness.start(command, out.parent / "logs")
    begun = time.monotonic()
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
        return cut_off(finished, tmp_path / name)

    return make

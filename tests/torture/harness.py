"""Starts training commands in forked processes whose heavy imports are done, and watches them.

A real start takes ten seconds of imports; a fork after them a fraction of one, so that a suite of
hundreds of crashes fits CI. Every wait has a limit, and nothing outlives the suite.
"""

import contextlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing import forkserver
from pathlib import Path

import pytest

from llmctl.signals import exit_on_signals
from tests.processes import call_llmctl

PRELOADED = "tests.torture.preloaded"
LIMIT = 120
"""Seconds that no trial may take."""

context = multiprocessing.get_context("forkserver")
started: list["Trial"] = []


@dataclass
class Trial:
    """One process of a command, and where its output goes."""

    process: multiprocessing.context.ForkServerProcess
    stdout: Path
    stderr: Path
    ready: Path
    """There once the process minds signals."""

    @property
    def out(self) -> str:
        return self.stdout.read_text()

    @property
    def err(self) -> str:
        return self.stderr.read_text()

    @property
    def code(self) -> int | None:
        return self.process.exitcode

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def wait(self, seconds: float = LIMIT) -> int:
        """The exit code; a trial that takes too long is killed, and fails its test."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join(10)
            pytest.fail(f"still running after {seconds} s\n{self.err[-2000:]}")
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()
        self.process.join(10)


def start(
    arguments: Sequence[object],
    logs: Path,
    *,
    plant: Callable[[], None] | None = None,
    environment: dict[str, str] | None = None,
    umask: int = 0o022,
) -> Trial:
    """Run llmctl on the arguments in a new process.

    `plant` is called there first; what it does to the libraries dies with the process.
    """
    warm_up()
    logs.mkdir(parents=True, exist_ok=True)
    stem = logs / str(len(started))
    stdout, stderr = stem.with_suffix(".out"), stem.with_suffix(".err")
    for path in (stdout, stderr):
        path.touch()
    ready = stem.with_suffix(".ready")
    inside = (
        *([str(a) for a in arguments], stdout, stderr, ready),
        *(plant, environment or {}, umask),
    )
    process = context.Process(target=_inside, args=inside)
    process.start()
    trial = Trial(process, stdout, stderr, ready)
    started.append(trial)
    return trial


@cache
def warm_up() -> None:
    """Let the fork server import what is heavy, while the tests make what they need.

    It finds only modules that its environment names; the first trial waits for it.
    """
    context.set_forkserver_preload([PRELOADED])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]), prepend=os.pathsep)
        forkserver.ensure_running()


def end_all() -> list[int]:
    """Kill what still runs; the pids of those that did."""
    alive = [trial for trial in started if trial.code is None]
    for trial in alive:
        trial.kill()
    return [trial.process.pid for trial in alive]


def _inside(
    arguments: list[str],
    stdout: Path,
    stderr: Path,
    ready: Path,
    plant: Callable[[], None] | None,
    environment: dict[str, str],
    umask: int,
) -> None:
    """What a new interpreter would do, up to the exit code that the shell sees."""
    for number, path in ((1, stdout), (2, stderr)):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.update(environment)
    os.umask(umask)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell ignores it
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    exit_on_signals()  # as the process of a command begins
    ready.touch()
    code = 1
    try:
        assert PRELOADED in sys.modules, "the fork server has imported nothing"
        import torch

        torch.set_num_threads(1)
        if plant is not None:
            plant()
        code = call_llmctl(arguments)
    except KeyboardInterrupt:
        code = 130
        traceback.print_exc()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def until(
    condition: Callable[[], object], trial: Trial | None = None, seconds: float = 60
) -> object:
    """Poll each millisecond until the condition holds; False if the trial ended before."""
    limit = time.monotonic() + seconds
    while True:
        ended = trial is not None and trial.code is not None
        if found := condition():
            return found
        if ended:
            return False
        if time.monotonic() > limit:
            if trial is not None:
                trial.kill()
            pytest.fail(f"nothing happened for {seconds} s\n{trial.err[-2000:] if trial else ''}")
        time.sleep(0.001)


def kill_when(
    launch: Callable[[], Trial], out: Path, moment: Callable[[Trial], object], tries: int = 8
) -> Trial:
    """Start a run and SIGKILL it once `moment` returns; how far it was is left in `out`.

    One that had ended by then was not killed: what it did is undone, and it is started again.
    """
    before = out.with_name(f"{out.name}-before")
    if out.exists():
        shutil.copytree(out, before)
    for _ in range(tries):
        trial = launch()
        moment(trial)
        trial.kill()
        if trial.code == -signal.SIGKILL:
            shutil.rmtree(before, ignore_errors=True)
            return trial
        assert trial.code == 0, trial.err
        shutil.rmtree(out)
        if before.exists():
            shutil.copytree(before, out)
    pytest.fail(f"{tries} runs ended before they could be killed")


def unfinished(run: Path) -> list[str]:
    """Names of checkpoints half-written or half-deleted: a save was under way."""
    return [n for n in _names(run) if n.startswith((".tmp-checkpoint-", ".trash-checkpoint-"))]


def saving_step(run: Path) -> int:
    """The step that is being saved now, or 0."""
    steps = [int(n.rpartition("-")[2]) for n in _names(run) if n.startswith(".tmp-checkpoint-")]
    return max(steps, default=0)


def checkpoints(run: Path) -> dict[int, Path]:
    """Checkpoints under their final name, by step, the oldest first."""
    steps = sorted(int(n[11:]) for n in _names(run) if n.startswith("checkpoint-"))
    return {step: run / "checkpoints" / f"checkpoint-{step}" for step in steps}


def _names(run: Path) -> Iterator[str]:
    try:
        return iter(os.listdir(run / "checkpoints"))  # noqa: PTH208 - a millisecond matters
    except FileNotFoundError:
        return iter(())


def stop_at(trial: Trial, run: Path, step: int) -> None:
    """Freeze a trial once it has saved `step` or a later one; SIGCONT lets it go on."""
    assert until(lambda: max(checkpoints(run), default=0) >= step, trial), trial.err
    trial.send(signal.SIGSTOP)


def fill(disk: Path) -> Path:
    """A file that takes all that is free; its path."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        for size in (1 << 20, 1 << 12):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"x" * size)
    return filler


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A tmpfs of its own."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this needs the right to mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)

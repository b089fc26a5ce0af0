"""Several processes: a signal that they see at different times, and a rank that is killed.

Ranks are forked as torchrun would start them; in the long form torchrun itself starts them too.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial

import psutil
import pytest

from llmctl.runs.resume import defect
from tests.processes import free_port
from tests.torture.conftest import differences, outcome, tally
from tests.torture.harness import (
    LIMIT,
    Trial,
    checkpoints,
    fill,
    mounted,
    saving_step,
    unfinished,
    until,
)
from tests.torture.subjects import LONG, cases, every_subject

pytestmark = pytest.mark.slow
FLAGS = ("--max-steps", 40, "--save-every", 5, "--eval-every", 20)
LAUNCHERS = ["forked", *(["torchrun"] if LONG else [])]


@dataclass
class Pair:
    """The ranks of a run, each with its pid, and how they ended."""

    pids: list[int]
    wait: object
    errors: object


@pytest.fixture
def forked(run):
    def start(subject, out, *flags, world=2, size="small"):
        common = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
        common["MASTER_ADDR"] = "127.0.0.1"
        common["MASTER_PORT"] = str(free_port())
        ranks: list[Trial] = [
            run(
                subject,
                size,
                out,
                *FLAGS,
                *flags,
                environment={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(world)
        ]

        def wait(seconds):
            limit = time.monotonic() + seconds
            return [rank.wait(max(0.1, limit - time.monotonic())) for rank in ranks]

        return Pair([r.process.pid for r in ranks], wait, lambda: "\n".join(r.err for r in ranks))

    return start


@pytest.fixture
def torchrun(tokens, tmp_path):
    launched = []

    def start(subject, out, *flags):
        command = subject.command(tokens, "small", out, *FLAGS, *flags)
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
        log = tmp_path / f"torchrun-{len(launched)}"
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, *launcher, "-m", "llmctl", *map(str, command)],
                stdout=subprocess.DEVNULL,
                stderr=file,
                env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            )
        launched.append(process)
        ranks = until(lambda: workers(process.pid), seconds=60)

        def wait(seconds):
            code = process.wait(seconds)
            assert not [r for r in ranks if r.is_running() and r.status() != "zombie"]
            return [code]

        return Pair([r.pid for r in ranks], wait, log.read_text)

    yield start
    for process in launched:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
        process.wait()


def workers(pid):
    """The two ranks, in their order, once torchrun has started them."""
    found = [p for p in psutil.Process(pid).children() if "llmctl" in p.cmdline()]
    try:
        ranked = sorted(found, key=lambda p: p.environ().get("RANK", ""))
    except psutil.Error:
        return []
    return ranked if len(ranked) == 2 else []


@pytest.fixture(params=LAUNCHERS)
def pair(request, forked, torchrun):
    return forked if request.param == "forked" else torchrun


@pytest.fixture(scope="module")
def undisturbed():
    """Outcomes of two-rank runs that nothing disturbed, by subject."""
    return {}


@pytest.fixture
def whole(forked, undisturbed, tmp_path):
    def get(subject):
        if subject.name not in undisturbed:
            pair = forked(subject, tmp_path / "whole")
            assert pair.wait(LIMIT) == [0, 0], pair.errors()
            undisturbed[subject.name] = outcome(tmp_path / "whole")
        return undisturbed[subject.name]

    return get


def resumes_to_the_same_bits(forked, subject, out, wanted, group):
    again = forked(subject, out, "--resume")
    assert again.wait(LIMIT) == [0, 0], again.errors()
    tally(group, subject, "survived")
    assert differences(wanted, outcome(out)) == []
    tally(group, subject, "bit-identical")


@every_subject
def test_three_ranks_resume_in_the_same_bits(forked, copy_of, tmp_path, subject):
    """The sum of three numbers depends on their order; gradients of megabytes are sent in parts."""
    group = "three ranks, resumed from the middle"
    whole = tmp_path / "whole"
    flags = ("--max-steps", 8, "--save-every", 4, "--eval-every", 4, "--keep", 9)
    start = partial(forked, subject, world=3, size="large")
    started = start(whole, *flags)
    assert started.wait(LIMIT) == [0, 0, 0], started.errors()
    tally(group, subject, "tried")
    out = copy_of(whole)
    for step, path in checkpoints(out).items():
        if step > 4:
            shutil.rmtree(path)
    again = start(out, *flags, "--resume")
    assert again.wait(LIMIT) == [0, 0, 0], again.errors()
    assert "checkpoint-4" in again.errors()
    tally(group, subject, "survived")
    assert differences(outcome(whole), outcome(out)) == []
    tally(group, subject, "bit-identical")


@cases("skew", [0.05, 1, 0], short=[0.05, 1], brief=[0.05])
def test_both_ranks_end_though_they_see_the_signal_apart(
    pair, forked, whole, tmp_path, subject, skew
):
    group = "two ranks, signalled 0 to 1 s apart"
    wanted, out = whole(subject), tmp_path / "run"
    started = pair(subject, out)
    until(lambda: checkpoints(out))
    send(started.pids[0])
    time.sleep(skew)
    send(started.pids[1])
    codes = started.wait(30)
    tally(group, subject, "tried")
    assert set(codes) <= {143, 1} if len(codes) == 1 else codes == [143, 143], started.errors()
    assert not unfinished(out)
    assert all(defect(p) is None for p in checkpoints(out).values())
    assert not (out / "model").exists()
    resumes_to_the_same_bits(forked, subject, out, wanted, group)


@cases("rank", [0, 1], short=[0])
def test_the_other_rank_ends_when_one_is_killed(pair, forked, whole, tmp_path, subject, rank):
    group = "two ranks, one SIGKILLed"
    wanted, out = whole(subject), tmp_path / "run"
    started = pair(subject, out)
    until(lambda: len(checkpoints(out)) > 1)
    until(lambda: saving_step(out))
    os.kill(started.pids[rank], signal.SIGKILL)
    codes = started.wait(60)
    tally(group, subject, "tried")
    assert 0 not in codes
    assert all(defect(p) is None for p in checkpoints(out).values())
    resumes_to_the_same_bits(forked, subject, out, wanted, group)


@every_subject
def test_what_only_rank_0_sees_ends_both(forked, tmp_path, subject):
    """Rank 0 alone looks through the checkpoints; the other one waits for what it finds."""
    out = tmp_path / "run"
    started = forked(subject, out)
    until(lambda: checkpoints(out))
    for pid in started.pids:
        send(pid)
    started.wait(30)
    for path in checkpoints(out).values():
        (path / "state.json").write_text("")
    broken = forked(subject, out, "--resume")
    codes = broken.wait(30)
    assert codes[0] == 4, broken.errors()
    assert codes[1] != 0
    assert broken.errors().count("error:") == 1, broken.errors()
    assert "Traceback" not in broken.errors(), broken.errors()


@every_subject
def test_a_disk_that_rank_0_finds_full_ends_both(forked, whole, tmp_path, subject):
    wanted = whole(subject)
    with mounted(tmp_path / "disk", "size=24m") as disk:
        out = disk / "run"
        started = forked(subject, out)
        until(lambda: checkpoints(out))
        fill(disk)
        codes = started.wait(30)
        assert codes[0] == 5, started.errors()
        assert codes[1] != 0
        assert "Traceback" not in started.errors(), started.errors()
        assert not unfinished(out)
        (disk / "filler").unlink()
        tally("two ranks, the disk fills up", subject, "tried")
        resumes_to_the_same_bits(forked, subject, out, wanted, "two ranks, the disk fills up")


def send(pid):
    """SIGTERM, unless the rank has ended with the other one already."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)

"""Two hosts with a network between them: what becomes of a run that loses one, or the cable."""

import json
import os
import signal
import time
from threading import Timer

import pytest

from llmctl.training import loop
from tests.processes import call_llmctl
from tests.run_files import digest
from tests.training.objectives import SFT, run_ranks
from tests.two_hosts import NAMES, can_be_made, two_hosts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not can_be_made(), reason="needs root, unshare and ip: network namespaces"),
]
TIMEOUT = 5
FLAGS = ("--max-steps", 6, "--save-every", 1, "--peer-timeout", TIMEOUT)
ENDED = "error: another process of this run ended"
SILENT = f"error: another process of this run has not answered for {TIMEOUT} s"


def call_on_host(hosts, commands, troubles):
    """Run this rank's command on its host; in its third step its trouble happens."""
    rank = int(os.environ["RANK"])
    hosts[rank].enter()
    os.environ |= {"MASTER_ADDR": hosts[0].address, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    accumulate = loop.accumulate

    def troubled(trainer, batches):
        if trainer.state.progress.step == 2:
            befall(hosts[rank], troubles.get(rank))
        return accumulate(trainer, batches)

    loop.accumulate = troubled
    return call_llmctl(commands[rank])


def befall(host, trouble):
    if trouble == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    elif trouble is not None:
        host.link("down")
        if trouble == "cut for a while":
            Timer(TIMEOUT / 2, host.link, ["up"]).start()


@pytest.fixture
def start(inputs, tmp_path):
    """Train on both hosts, with flags that only one has -> exit codes, what each wrote, seconds."""

    def run(troubles, more=((), ()), out=tmp_path / "run"):
        commands = [SFT.arguments(inputs, out, *FLAGS, *own) for own in more]
        began = time.monotonic()
        with two_hosts() as hosts:
            ended = run_ranks(call_on_host, (hosts, commands, troubles), tmp_path / "logs")
        codes, texts = zip(*ended, strict=True)
        assert "Traceback" not in "".join(texts)
        return list(codes), texts, time.monotonic() - began

    return run


def state(run):
    status = json.loads((run / "status.json").read_text())
    return status["state"], status.get("exit_code"), status["resumable"]


@pytest.mark.parametrize("lost", [0, 1])
def test_a_host_that_dies_ends_the_other_in_words(start, tmp_path, lost):
    """Also the first, which has the store, and writes the run."""
    codes, texts, seconds = start({lost: "dies"})
    assert (codes[lost], codes[1 - lost]) == (-signal.SIGKILL, 5), texts
    assert ENDED in texts[1 - lost]
    assert seconds < 30
    left = state(tmp_path / "run")
    assert left == (("failed", 5, True) if lost else ("running", None, True))


def test_a_cable_that_is_cut_ends_both(start, tmp_path):
    codes, texts, seconds = start({1: "cut"})
    assert codes == [5, 5], texts
    assert all(SILENT in text for text in texts), texts
    assert TIMEOUT < seconds < 60
    assert state(tmp_path / "run") == ("failed", 5, True)


def test_a_cable_that_is_out_for_a_while_changes_nothing(start, tmp_path):
    codes, texts, seconds = start({1: "cut for a while"})
    assert codes == [0, 0], texts
    assert seconds > TIMEOUT / 2
    assert start({}, out=tmp_path / "whole")[0] == [0, 0]
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")


@pytest.mark.parametrize(
    ("rank", "flags", "code", "said"),
    [
        (0, ("-c", "none.yaml"), 2, "none.yaml"),
        (1, ("-c", "none.yaml"), 2, "none.yaml"),
        (1, ("--data", "none.jsonl"), 3, "none.jsonl"),
        (1, ("--lr", "0.5"), 2, "`lr` differs between processes: 0.002 on rank 0 (alder), 0.5 on"),
    ],
)
def test_what_one_host_refuses_is_told_on_both(start, tmp_path, rank, flags, code, said):
    codes, texts, seconds = start({}, [flags if number == rank else () for number in range(2)])
    assert codes == [code, code], texts
    assert seconds < 60
    for text in texts:
        assert text.count("error: ") == 1, text
        assert said in text
        assert f"rank {rank} ({NAMES[rank]})" in text
    assert not (tmp_path / "run").exists()

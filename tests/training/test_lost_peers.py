"""A process that ends or does not answer ends the others in words, to be resumed."""

import json
import os
import signal
import time

import pytest

from llmctl.config.commands.sft import SftConfig
from llmctl.errors import ResourceError
from llmctl.launch import GROUP
from llmctl.training import distributed, loop
from tests.processes import call_llmctl
from tests.run_files import digest
from tests.training.objectives import SFT, run_ranks

TIMEOUT = 3
FLAGS = ("--save-every", 1, "--max-steps", 6, "--batch-size", 4)
ENDED = "another process of this run ended"
SILENT = f"another process of this run has not answered for {TIMEOUT} s"


def call_troubled(arguments, what):
    """Run a command; in its third step this happens to rank 1."""
    accumulate = loop.accumulate

    def troubled(trainer, batches):
        if trainer.state.progress.step == 2 and os.environ["RANK"] == "1":
            if what == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            elif what == "fails":
                raise AssertionError("a bug")
            else:  # its machine stands still, or the network passes nothing on
                time.sleep(3 * TIMEOUT)
        return accumulate(trainer, batches)

    loop.accumulate = troubled
    return call_llmctl(arguments)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "codes", "said"),
    [("silent", [5, 5], SILENT), ("killed", [5, -9], ENDED), ("fails", [5, 1], ENDED)],
)
def test_a_lost_process_ends_the_run_and_it_resumes(inputs, tmp_path, what, codes, said):
    out, whole = tmp_path / "run", tmp_path / "whole"
    arguments = SFT.arguments(inputs, out, *FLAGS, "--peer-timeout", TIMEOUT)
    began = time.monotonic()
    ended = run_ranks(call_troubled, (arguments, what), tmp_path / "logs")
    texts = [text for _, text in ended]
    assert [code for code, _ in ended] == codes, texts
    assert time.monotonic() - began < 60
    errors = [line for line in texts[0].splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, texts[0]
    assert said in errors[0]
    assert "--resume" in texts[0]
    assert "Traceback" not in texts[0]
    status = json.loads((out / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["resumable"]) == ("failed", 5, True)
    resumed = run_ranks(call_llmctl, ([*arguments, "--resume"],), tmp_path / "again")
    assert [code for code, _ in resumed] == [0, 0], resumed
    undisturbed = run_ranks(
        call_llmctl, (SFT.arguments(inputs, whole, *FLAGS),), tmp_path / "third"
    )
    assert [code for code, _ in undisturbed] == [0, 0], undisturbed
    assert digest(out) == digest(whole)


def call_slow_to_prepare(arguments):
    """Run a command; rank 0 takes longer to prepare than a process may be silent in training."""
    from llmctl.commands import sft

    prepare = sft.prepare_sft

    def slow(*inner):
        if os.environ["RANK"] == "0":
            time.sleep(2 * TIMEOUT)
        return prepare(*inner)

    sft.prepare_sft = slow
    return call_llmctl(arguments)


@pytest.mark.slow
def test_preparation_may_take_longer(inputs, tmp_path):
    arguments = SFT.arguments(inputs, tmp_path / "run", *FLAGS, "--peer-timeout", TIMEOUT)
    ended = run_ranks(call_slow_to_prepare, (arguments,), tmp_path / "logs")
    assert [code for code, _ in ended] == [0, 0], ended


@pytest.fixture
def grouped(monkeypatch):
    """Set what a launcher sets for the first of so many processes."""

    def put(world):
        values = (0, world, 0, "127.0.0.1", 29500)
        for name, value in zip(GROUP, values, strict=True):
            monkeypatch.setenv(name, str(value))

    return put


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[../gloo/unbound_buffer.cc:78] Timed out waiting 20000ms for recv operation", "answered"),
        ("Application timeout caused pair closure", "answered"),  # seen where a link was cut
        ("wait timeout after 600000ms, keys: /default_pg/0//0", "answered"),
        ("The client socket has timed out after 600000ms while trying to connect", "answered"),
        ("[../gloo/pair.cc:547] Connection closed by peer [127.0.0.1]:9174", "ended"),
        ("Remote peer closed the connection", "ended"),
        ("Read error [10.0.0.2]:38710: Connection reset by peer", "ended"),
        ("Read error [10.0.0.2]:38710: Broken pipe", "ended"),
        ("Application error caused pair closure", "ended"),
        ("Unexpected poll result on socket 17", "ended"),
        ("connect [10.0.0.2]:38710: Network is unreachable", "ended"),
        ("connect [10.0.0.2]:38710: No route to host", "ended"),
        ("ncclRemoteError: a remote process exiting prematurely", "ended"),
    ],
)
def test_errors_of_the_network_become_words(grouped, text, said):
    grouped(2)
    with (
        pytest.raises(ResourceError, match=f"another process of this run .*{said}"),
        distributed.lost_peers_named(600),
    ):
        raise RuntimeError(text)


def test_other_errors_and_those_of_one_process_stay(grouped):
    for world, text in ((2, "shapes do not match"), (1, "Timed out waiting 20ms")):
        grouped(world)
        with pytest.raises(RuntimeError, match=text), distributed.lost_peers_named(600):
            raise RuntimeError(text)


def test_ten_minutes_are_the_default():
    assert SftConfig(model="m", data=["d"]).peer_timeout == 600

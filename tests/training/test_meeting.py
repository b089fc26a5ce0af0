"""What one process refuses before the group forms ends all of them, in words and at once."""

import os
import time

import pytest
from accelerate import Accelerator

from llmctl.errors import DataError, ModelError
from llmctl.training.fault_tolerance import together
from llmctl.training.meeting import Answer, first_error, met
from tests.processes import call_llmctl
from tests.training.objectives import SFT, run_ranks


def call_own(arguments):
    """Run a command with the arguments of this rank."""
    return call_llmctl(arguments[int(os.environ["RANK"])])


@pytest.fixture
def start(tmp_path):
    """Start a rank with each command -> exit codes, all that was written, seconds."""

    def run(*commands):
        began = time.monotonic()
        ended = run_ranks(call_own, (commands,), tmp_path / "logs")
        text = "".join(text for _, text in ended)
        return [code for code, _ in ended], text, time.monotonic() - began

    return run


def refused(ended, code, said):
    codes, text, seconds = ended
    assert codes == [code, code], text
    assert seconds < 60
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, text
    assert said in errors[0]
    assert "Traceback" not in text


REFUSED = {
    "a recipe that is not there": (["-c", "none.yaml"], 2, "none.yaml"),
    "a flag that does not exist": (["--no-such-flag"], 2, "No such option: --no-such-flag"),
    "a value that does not go": (["--lr", "fast"], 2, "--lr"),
    "a device that is not there": (["--device", "cuda:9"], 2, "--device"),
}


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("what", REFUSED)
def test_what_one_refuses_all_refuse(inputs, tmp_path, start, what, rank):
    more, code, said = REFUSED[what]
    commands = [SFT.arguments(inputs, tmp_path / "run") for _ in range(2)]
    commands[rank] += more
    refused(start(*commands), code, said)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_group_that_accelerate_cannot_form_on_one_is_refused_by_all(inputs, tmp_path):
    arguments = SFT.arguments(inputs, tmp_path / "run")
    ended = run_ranks(call_with_an_engine, (arguments,), tmp_path / "logs")
    text = "".join(text for _, text in ended)
    assert [code for code, _ in ended] == [2, 2], text
    assert text.count("DeepSpeed is not supported") == 1


def call_with_an_engine(arguments):
    """Run a command, on rank 1 with Accelerate's configuration of another machine."""
    if os.environ["RANK"] == "1":
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    return call_llmctl(arguments)


@pytest.mark.slow
def test_a_dry_run_ends_alike(inputs, tmp_path, start):
    commands = [SFT.arguments(inputs, tmp_path / "run", "--dry-run") for _ in range(2)]
    commands[1] += ["--data", str(tmp_path / "none.jsonl")]
    refused(start(*commands), 3, "none.jsonl")


@pytest.mark.slow
def test_a_completed_run_is_seen_by_all_or_refused(inputs, train, tmp_path, start):
    out = tmp_path / "run"
    assert train(SFT, out).code == 0
    here = SFT.arguments(inputs, out, "--resume")
    codes, text, _ = start(here, here)
    assert codes == [0, 0], text
    assert text.count(f"{out}\n") == 1
    there = SFT.arguments(inputs, tmp_path / "other", "--resume")
    refused(start(here, there), 3, "sees a completed run, and rank 1")


def meet_anew(_):
    """Meet twice in one store, as where a launcher starts again; rank 1 is first the second time.

    What it finds then are the answers of the first meeting.
    """
    rank = int(os.environ["RANK"])
    with met(Answer(), 30):
        time.sleep(1 - rank)
        try:
            with met(Answer(None if rank else DataError("broken since")), 30):
                return 0
        except DataError as error:
            return error.code


@pytest.mark.slow
def test_answers_of_an_earlier_start_do_not_count(tmp_path):
    ended = run_ranks(meet_anew, (None,), tmp_path / "logs")
    assert [code for code, _ in ended] == [3, 3], ended


def fail_before_others_agree(_):
    """Fail on rank 1, before the other has something to agree on."""
    accelerator = Accelerator(cpu=True)
    try:
        with together(accelerator):
            if accelerator.process_index == 1:
                raise DataError("bad row")
            with together(accelerator):
                return 0
    except DataError as error:
        return error.code


@pytest.mark.slow
def test_an_error_that_comes_before_others_agree_ends_all_alike(tmp_path):
    ended = run_ranks(fail_before_others_agree, (None,), tmp_path / "logs")
    assert [code for code, _ in ended] == [3, 3], ended


def test_an_error_is_told_once_on_each_machine_and_is_the_same_everywhere():
    def told():
        errors = [None, DataError("bad row"), ModelError("no model"), None]
        return list(zip("AABB", errors, strict=True))

    raised = [first_error(told(), rank) for rank in range(4)]
    assert [error.code for error in raised] == [3, 3, 3, 3]
    assert [rank for rank in range(4) if not raised[rank].is_reported] == [1, 2]
    assert {str(error) for error in raised} == {"bad row, on rank 1 (A)"}
    here = [("A", None), ("A", DataError("bad row"))]
    assert str(first_error(here, 1)) == "bad row"
    assert first_error([("A", None), ("B", None)], 0) is None

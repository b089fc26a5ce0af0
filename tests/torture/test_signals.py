"""SIGINT, SIGTERM, SIGUSR1: saved at the step's end and resumable; a second one leaves at once."""

import json
import signal
import time
from functools import partial

import pytest

from llmctl.runs.resume import defect
from tests.torture.conftest import tally
from tests.torture.harness import checkpoints, saving_step, until
from tests.torture.plants import list_events
from tests.torture.subjects import BRIEF, SUBJECTS, cases, every_subject

pytestmark = pytest.mark.slow
LONGER = ("--max-steps", 50, "--save-every", 25, "--eval-every", 25)
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 143}


def status(run):
    return json.loads((run / "status.json").read_text())


def last_step(out):
    """Of the last line of metrics that is whole."""
    *lines, _ = (out / "metrics.jsonl").read_text().split("\n")
    return json.loads(lines[-1])["step"]


def has_trained(out):
    return lambda: (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").stat().st_size


@cases("number", CODES, brief=[signal.SIGTERM])
def test_a_signal_saves_at_the_steps_end(run, reference, tmp_path, subject, number):
    whole = reference(subject, "small", *LONGER)
    out = tmp_path / "run"
    trial = run(subject, "small", out, *LONGER)
    assert until(has_trained(out), trial), trial.err
    trial.send(number)
    assert trial.wait(30) == CODES[number], trial.err
    tally("a signal", subject, "tried")
    found = status(out)
    wanted = ("preempted", True, CODES[number])
    assert (found["state"], found["resumable"], found["exit_code"]) == wanted
    assert not (out / "model").exists()
    newest = max(checkpoints(out))
    assert f"after step {newest}: saved" in trial.err
    assert defect(checkpoints(out)[newest]) is None
    again = run(subject, "small", out, *LONGER, "--resume")
    assert again.wait() == 0, again.err
    tally("a signal", subject, "survived")
    assert whole.matches(out)
    tally("a signal", subject, "bit-identical")


@cases("number", range(20), short=range(1))
def test_a_signal_at_any_moment(run, reference, draw, tmp_path, subject, number):
    """While it loads, trains, saves or writes the model."""
    group = "a signal at a random moment"
    whole = reference(subject, "large")
    out = tmp_path / "run"
    sent = draw.choice([*CODES])
    trial = run(subject, "large", out, "--resume")
    until(trial.ready.exists, trial)
    time.sleep(draw.uniform(0, whole.seconds))
    trial.send(sent)
    code = trial.wait(30)
    tally(group, subject, "tried")
    complete = (out / "model").exists() and code == 0
    assert complete or code == CODES[sent], (sent, code, trial.err)
    assert "Traceback" not in trial.err, trial.err
    if not complete:  # a result is whole, also in the instant before the run says so
        assert not (out / "model").exists() or whole.matches(out)
        assert all(defect(p) is None for p in checkpoints(out).values())
    again = run(subject, "large", out, "--resume")
    assert again.wait() == 0, again.err
    tally(group, subject, "survived")
    assert whole.matches(out)
    tally(group, subject, "bit-identical")


@every_subject
@pytest.mark.parametrize("moment", ["at once", "while it saves"])
def test_a_second_signal_leaves_at_once(run, reference, tmp_path, subject, moment):
    flags = ("--save-every", 4, "--keep", 3)
    whole = reference(subject, "large")
    out = tmp_path / "run"
    trial = run(subject, "large", out, *flags)
    assert until(lambda: 4 in checkpoints(out) and last_step(out) > max(checkpoints(out)), trial)
    trial.send(signal.SIGTERM)
    if moment == "while it saves":
        assert until(lambda: saving_step(out) > 4, trial)
    else:
        time.sleep(0.01)
    trial.send(signal.SIGTERM)
    begun = time.monotonic()
    assert trial.wait(10) == 143, trial.err
    assert time.monotonic() - begun < 1
    tally("a second signal", subject, "tried")
    assert not (out / "model").exists()
    assert defect(checkpoints(out)[4]) is None
    assert all(defect(p) is None for p in checkpoints(out).values())
    again = run(subject, "large", out, *flags, "--resume")
    assert again.wait() == 0, again.err
    tally("a second signal", subject, "survived")
    assert whole.matches(out)
    tally("a second signal", subject, "bit-identical")


@pytest.mark.parametrize("subject", [*SUBJECTS, *BRIEF], ids=lambda subject: subject.name)
def test_a_signal_right_after_a_save_leaves_that_checkpoint_alone(run, tmp_path, subject):
    """What is written again is gone for an instant, and it may be the only one."""
    out, log = tmp_path / "run", tmp_path / "events"
    plant = partial(list_events, log, "rename checkpoints/checkpoint-2")
    trial = run(subject, "small", out, plant=plant)
    assert trial.wait(30) == 143, trial.err
    assert ".trash-checkpoint-2" not in log.read_text()
    assert status(out)["resumable"]
    assert f"after step {max(checkpoints(out))}: saved" in trial.err

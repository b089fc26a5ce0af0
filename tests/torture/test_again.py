"""Crashes in a row and during resume, finished runs, other runs' checkpoints, two runs at once."""

import json
import shutil
import signal
import time
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmctl.files import sha256_file
from llmctl.runs.checkpoint import seal
from llmctl.runs.resume import defect
from tests.torture.conftest import tally
from tests.torture.harness import checkpoints, kill_when, saving_step, stop_at, until
from tests.torture.subjects import LONG, cases, every_subject
from tests.torture.test_kill import ends_the_same

pytestmark = pytest.mark.slow


@cases("number", range(5), short=range(1))
def test_two_crashes_in_a_row(run, reference, draw, tmp_path, subject, number):
    whole = reference(subject, "large")
    out = tmp_path / "run"
    for earliest in (2, 5):

        def moment(trial, earliest=earliest):
            wanted = draw.randint(earliest, earliest + 2)
            until(lambda: saving_step(out) >= wanted, trial)
            time.sleep(draw.uniform(0, whole.save_seconds))

        kill_when(lambda: run(subject, "large", out, "--resume"), out, moment)
    tally("two SIGKILLs in a row", subject, "tried")
    ends_the_same(run, subject, out, whole, "two SIGKILLs in a row")


@cases("number", range(12), short=range(1))
def test_a_crash_while_it_resumes(run, reference, draw, tmp_path, subject, number):
    whole = reference(subject, "large")
    out = tmp_path / "run"
    save = partial(until, lambda: saving_step(out) >= 4)
    kill_when(lambda: run(subject, "large", out), out, save)
    there = checkpoints(out)
    resume = partial(run, subject, "large", out, "--resume")
    kill_when(resume, out, lambda _: time.sleep(draw.uniform(0, 0.5)))
    assert all(defect(p) is None for p in checkpoints(out).values())
    assert max(checkpoints(out)) >= max(there)
    tally("SIGKILL while it resumes", subject, "tried")
    ends_the_same(run, subject, out, whole, "SIGKILL while it resumes")


@every_subject
def test_a_finished_run_is_left_untouched(run, reference, subject):
    whole = reference(subject, "small")
    before = {p: p.stat().st_mtime_ns for p in (whole.path, *whole.path.rglob("*"))}
    newest = list(checkpoints(whole.path).values())[-1]
    for flags in (("--resume",), ("--resume-from", newest)):
        trial = run(subject, "small", whole.path, *flags)
        assert trial.wait() == 0, trial.err
        assert "already complete" in trial.err
    assert {p: p.stat().st_mtime_ns for p in (whole.path, *whole.path.rglob("*"))} == before


@cases("name", ["renumbered", "renamed", "as it is"], short=["renumbered"])
def test_another_runs_checkpoint_is_not_picked(run, reference, tmp_path, subject, name):
    """Of the same recipe, with a higher step and other weights, and whole."""
    whole = reference(subject, "small")
    out, other = tmp_path / "run", tmp_path / "other"
    trial = run(subject, "small", out, "--keep", 2)
    stop_at(trial, out, 4)
    trial.kill()
    assert run(subject, "small", other, "--keep", 2).wait() == 0
    step = 12 if name == "as it is" else 99
    stale = out / "checkpoints" / f"checkpoint-{step}"
    shutil.rmtree(stale, ignore_errors=True)
    shutil.copytree(other / "checkpoints" / "checkpoint-12", stale)
    spoil_consistently(stale, step=99 if name == "renumbered" else 12)
    assert name == "renamed" or defect(stale) is None
    again = run(subject, "small", out, "--keep", 2, "--resume")
    assert again.wait() == 0, again.err
    assert any("passing over" in line and stale.name in line for line in again.err.splitlines())
    assert whole.matches(out)
    if step == 99:
        assert stale.exists(), "it was not this run's to delete"


def spoil_consistently(path, step):
    """Other weights, and a manifest that vouches for them."""
    file, manifest = path / "model.safetensors", json.loads((path / "manifest.json").read_bytes())
    save_file({k: torch.zeros_like(v) for k, v in load_file(file).items()}, file)
    manifest["step"] = step
    manifest["files"][file.name] = {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
    del manifest["sha256"]
    (path / "manifest.json").write_text(json.dumps({**manifest, "sha256": seal(manifest)}))


@every_subject
def test_a_frozen_process_keeps_its_run_and_goes_on_as_if_nothing_had_been(
    run, reference, tmp_path, subject
):
    whole = reference(subject, "small")
    out = tmp_path / "run"
    trial = run(subject, "small", out)
    stop_at(trial, out, 4)
    for flags in ((), ("--resume",), ("--overwrite",)):
        second = run(subject, "small", out, *flags)
        assert second.wait() == 3, second.err
        assert "in use" in second.err
    time.sleep(3 if LONG else 0)
    trial.send(signal.SIGCONT)
    assert trial.wait() == 0, trial.err
    assert whole.matches(out)

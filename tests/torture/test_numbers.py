"""Planted numbers and failures: stopped before a weight is touched, told with step and batch."""

import json
import shutil
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.torture import harness
from tests.torture.conftest import tally
from tests.torture.harness import checkpoints
from tests.torture.plants import spoil_loss
from tests.torture.subjects import PRETRAIN, every_subject
from tests.torture.test_damage import error_of

pytestmark = pytest.mark.slow


def all_finite(run):
    """Every number in every checkpoint."""
    files = [f for path in checkpoints(run).values() for f in path.glob("*.safetensors")]
    tensors = [tensor for file in files for tensor in load_file(file).values()]
    return all(bool(t.isfinite().all()) for t in tensors if t.is_floating_point())


@pytest.fixture
def spoiled(run, tmp_path):
    """Run a subject with bad forward passes -> trial, its directory, optimizer steps taken."""

    def start(subject, kind, passes, *flags):
        out, log = tmp_path / "run", tmp_path / "steps"
        trial = run(subject, "small", out, *flags, plant=partial(spoil_loss, kind, passes, log))
        trial.wait()
        return trial, out, len(log.read_text())

    return start


@every_subject
@pytest.mark.parametrize("kind", ["inf", "nan-gradient"])
def test_a_bad_number_stops_before_the_optimizer_step(spoiled, subject, kind):
    trial, out, steps = spoiled(subject, kind, (6,))
    tally("inf loss, NaN gradient, lr 1e9, no memory", subject, "tried")
    assert trial.code == 7, trial.err
    message = error_of(trial)
    assert "step 6" in message
    assert "inf" in message if kind == "inf" else "nan" in message
    assert "(sequences " in message or "(examples " in message, "which batch?"
    assert steps == 5
    assert json.loads((out / "status.json").read_text())["state"] == "diverged"
    assert not (out / "model").exists()
    assert max(checkpoints(out)) == 4
    assert all_finite(out)
    tally("inf loss, NaN gradient, lr 1e9, no memory", subject, "survived")


@every_subject
def test_a_run_that_diverged_resumes_from_its_last_good_step(
    spoiled, run, reference, tmp_path, subject
):
    """The cause was outside of the run (a bad device): without it, the run ends as it would."""
    whole = reference(subject, "small")
    spoiled(subject, "inf", (6,))
    again = run(subject, "small", tmp_path / "run", "--resume")
    assert again.wait() == 0, again.err
    assert whole.matches(tmp_path / "run")


@every_subject
def test_a_learning_rate_that_ruins_the_model(run, tmp_path, subject):
    out = tmp_path / "run"
    trial = run(subject, "small", out, "--lr", 1e9, "--warmup", 0, "--save-every", 1)
    tally("inf loss, NaN gradient, lr 1e9, no memory", subject, "tried")
    assert trial.wait() == 7, trial.err
    assert "step" in error_of(trial)
    assert all_finite(out)
    tally("inf loss, NaN gradient, lr 1e9, no memory", subject, "survived")


@every_subject
def test_no_memory_names_what_keeps_the_effective_batch(spoiled, run, reference, tmp_path, subject):
    trial, out, steps = spoiled(subject, "memory", (6,))
    tally("inf loss, NaN gradient, lr 1e9, no memory", subject, "tried")
    assert trial.code == 5, trial.err
    message = error_of(trial)
    assert "--batch-size 2" in message
    assert "--grad-accum 2" in message
    assert steps == 5, "it started over"
    assert all_finite(out)
    assert json.loads((out / "status.json").read_text())["resumable"]
    tally("inf loss, NaN gradient, lr 1e9, no memory", subject, "survived")
    assert run(subject, "small", out, "--resume").wait() == 0
    assert reference(subject, "small").matches(out)


@every_subject
@pytest.mark.parametrize("kind", ["inf", "nan-gradient"])
def test_skipping_counts_and_goes_on(spoiled, subject, kind):
    trial, out, steps = spoiled(subject, kind, (3, 6), "--on-nan", "skip")
    assert trial.code == 0, trial.err
    assert steps == 10
    assert all_finite(out)
    for step in (3, 6):
        assert any("skip" in line and f"step {step}" in line for line in trial.err.splitlines())


@every_subject
def test_skipping_has_a_limit(spoiled, subject):
    flags = ("--on-nan", "skip", "--max-nan-skips", 2)
    trial, out, steps = spoiled(subject, "inf", (3, 6, 8), *flags)
    assert trial.code == 7, trial.err
    assert "step 8" in error_of(trial)
    assert steps == 5
    assert all_finite(out)


@every_subject
def test_skips_are_counted_across_a_resume(run, tmp_path, subject):
    out, flags = tmp_path / "run", ("--on-nan", "skip", "--max-nan-skips", 2)
    first = run(subject, "small", out, *flags, plant=two_skips_and_no_memory)
    assert first.wait() == 5, first.err
    second = run(subject, "small", out, *flags, "--resume", plant=partial(spoil_loss, "inf", (2,)))
    assert second.wait() == 7, second.err
    assert "3 skipped" in error_of(second)


def two_skips_and_no_memory():
    spoil_loss("inf", (2, 3))
    spoil_loss("memory", (9,))


def test_a_nan_weight_is_found_when_the_model_is_loaded(run, base, tokens, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(base / "model", broken)
    weights = load_file(broken / "model.safetensors")
    name = next(n for n in weights if "q_proj" in n)
    weights[name][0, 0] = torch.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "run"
    flags = ("pretrain", "--model", broken, "--tokens", tokens, "--max-steps", 4, "-o", out)
    trial = harness.start(PRETRAIN.entry, flags, tmp_path / "logs")
    assert trial.wait() == 4, trial.err
    assert name in error_of(trial)
    assert not out.exists()

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
from tests.torture.subjects import cases, every_subject
from tests.torture.test_damage import error_of

pytestmark = pytest.mark.slow
NAMED = ("sequences", "examples", "episodes")
"""What steps are made of."""


def all_finite(run):
    """Every number in every checkpoint."""
    files = [f for path in checkpoints(run).values() for f in path.glob("*.safetensors")]
    tensors = [tensor for file in files for tensor in load_file(file).values()]
    return all(bool(t.isfinite().all()) for t in tensors if t.is_floating_point())


@pytest.fixture
def spoiled(run, tmp_path):
    """Run a subject with a bad loss in steps -> trial, its directory, optimizer steps taken."""

    def start(subject, kind, steps, *flags):
        out, log = tmp_path / "run", tmp_path / "steps"
        passes = first_passes(subject, steps)
        trial = run(subject, "small", out, *flags, plant=partial(spoil_loss, kind, passes, log))
        trial.wait()
        return trial, out, len(log.read_text())

    return start


@cases("kind", ["inf", "nan-gradient"], brief=["nan-gradient"])
def test_a_bad_number_stops_before_the_optimizer_step_and_is_resumed_from(
    spoiled, run, reference, subject, kind
):
    """The cause was outside of the run (a bad device): without it, the run ends as it would."""
    trial, out, steps = spoiled(subject, kind, (6,))
    tally("inf loss, NaN gradient, lr 1e9, no memory", subject, "tried")
    assert trial.code == 7, trial.err
    message = error_of(trial)
    assert "step 6" in message
    assert "inf" in message if kind == "inf" else "nan" in message
    assert any(f"({what} " in message for what in NAMED), "which batch?"
    assert steps == subject.passes_before(6)
    assert json.loads((out / "status.json").read_text())["state"] == "diverged"
    assert not (out / "model").exists()
    assert max(checkpoints(out)) == 4
    assert all_finite(out)
    again = run(subject, "small", out, "--resume")
    assert again.wait() == 0, again.err
    tally("inf loss, NaN gradient, lr 1e9, no memory", subject, "survived")
    assert reference(subject, "small").matches(out)
    tally("inf loss, NaN gradient, lr 1e9, no memory", subject, "bit-identical")


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
    assert all(flag in message for flag in subject.less_memory), message
    assert steps == subject.passes_before(6), "it started over"
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
    assert steps == subject.passes_before(13) - 2 * subject.models
    assert all_finite(out)
    for step in (3, 6):
        assert any("skip" in line and f"step {step}" in line for line in trial.err.splitlines())


@every_subject
def test_skipping_has_a_limit(spoiled, subject):
    flags = ("--on-nan", "skip", "--max-nan-skips", 2)
    trial, out, steps = spoiled(subject, "inf", (3, 6, 8), *flags)
    assert trial.code == 7, trial.err
    assert "step 8" in error_of(trial)
    assert steps == subject.passes_before(8) - 2 * subject.models
    assert all_finite(out)


@every_subject
def test_skips_are_counted_across_a_resume(run, tmp_path, subject):
    out, flags = tmp_path / "run", ("--on-nan", "skip", "--max-nan-skips", 2)
    no_memory = first_passes(subject, (9,))
    plant = partial(two_skips_and_no_memory, first_passes(subject, (2, 3)), no_memory)
    first = run(subject, "small", out, *flags, plant=plant)
    assert first.wait() == 5, first.err
    plant = partial(spoil_loss, "inf", first_passes(subject, (2,)))
    second = run(subject, "small", out, *flags, "--resume", plant=plant)
    assert second.wait() == 7, second.err
    assert "3 skipped" in error_of(second)


def two_skips_and_no_memory(skipped, no_memory):
    spoil_loss("inf", skipped)
    spoil_loss("memory", no_memory)


def first_passes(subject, steps):
    """Numbers of the first backward pass of each of these steps."""
    return tuple(subject.passes_before(step) + 1 for step in steps)


def test_a_nan_weight_is_found_when_the_model_is_loaded(run, base, tokens, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(base / "model", broken)
    weights = load_file(broken / "model.safetensors")
    name = next(n for n in weights if "q_proj" in n)
    weights[name][0, 0] = torch.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "run"
    flags = ("pretrain", "--model", broken, "--tokens", tokens, "--max-steps", 4, "-o", out)
    trial = harness.start(flags, tmp_path / "logs")
    assert trial.wait() == 4, trial.err
    assert name in error_of(trial)
    assert not out.exists()

"""What the loop promises of every objective: it holds for each of them."""

import json
import math
import os
import signal
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from torch.nn.modules.module import register_module_forward_hook

from llmctl import hardware
from llmctl.files import sha256_file
from llmctl.training import loop, probe
from tests.processes import call_llmctl, run_llmctl
from tests.run_files import cut_off
from tests.training.objectives import (
    OBJECTIVES,
    RECORDER,
    SFT,
    Objective,
    assert_close_weights,
    assert_same_gradients,
    assert_same_metrics,
    every_objective,
    keep_gradients,
    lines_of,
    result_of,
    run_ranks,
)

DROPPING = Objective("sft-dropout", "sft", SFT.data, model="gpt2")
"""With dropout, so that the random generators decide the weights, too."""


def reads_words(module):
    """Whether a layer is the first of a model that trains, and no table of positions."""
    words = len(RECORDER.VOCABULARY)
    is_table = isinstance(module, torch.nn.Embedding) and module.num_embeddings == words
    return is_table and module.training


@pytest.fixture
def at_pass():
    """Do something at the n-th forward pass that trains: `at_pass(n, action)`.

    `action` is given the embedded words, and returns others or None.
    """
    handles = []

    def plant(number, action):
        seen = 0

        def hook(module, arguments, output):
            nonlocal seen
            if not torch.is_grad_enabled() or not reads_words(module):
                return None
            seen += 1
            return action(output) if seen == number else None

        handles.append(register_module_forward_hook(hook))

    yield plant
    for handle in handles:
        handle.remove()


@every_objective
def test_a_mean_of_means_would_be_seen(train, whole, tmp_path, monkeypatch, objective):
    """Rows differ in length or weight, wherever a step may be made of unequal micro-batches."""
    wanted, gradients = whole(objective).gradients, []
    keep_gradients(monkeypatch, gradients)
    monkeypatch.setattr(loop, "scaled", lambda loss, _, parts, world: mean_of(loss) / parts)
    flags = ("--batch-size", 2, "--grad-accum", 4, "--max-steps", 1)
    result = train(objective, tmp_path / "run", *flags)
    assert result.code == 0, result.err
    if objective.name in ("pretrain", "classify"):  # every window and every text weighs the same
        assert_same_gradients(gradients, wanted)
        return
    with pytest.raises(AssertionError):
        assert_same_gradients(gradients, wanted, rel=1e-3)


def mean_of(loss):
    return loss.total / loss.weight


@every_objective
def test_eight_times_one_is_two_times_four(train, whole, tmp_path, monkeypatch, objective):
    wanted, gradients = whole(objective), []
    keep_gradients(monkeypatch, gradients)
    result = train(objective, tmp_path / "run", "--batch-size", 2, "--grad-accum", 4)
    assert result.code == 0, result.err
    assert_same_gradients(gradients, wanted.gradients)
    assert_same_metrics(lines_of(tmp_path / "run"), wanted.lines, 1e-5)


@pytest.mark.slow
@every_objective
def test_two_processes_are_one_with_twice_the_batch(inputs, whole, tmp_path, objective):
    flags = ("--processes", 2, "--batch-size", 2, "--grad-accum", 2)
    arguments = objective.arguments(inputs, tmp_path / "run", *flags)
    ended = run_ranks(call_llmctl, (arguments,), tmp_path / "logs")
    assert [code for code, _ in ended] == [0, 0], ended
    assert_same_metrics(lines_of(tmp_path / "run"), whole(objective).lines, 1e-5)
    assert_close_weights(tmp_path / "run", whole(objective).out)


@pytest.mark.slow
def test_the_launcher_starts_two_processes(cli, inputs, whole, tmp_path):
    """By `--processes 2` alone, as a user types it."""
    arguments = SFT.arguments(inputs, tmp_path / "run", "--processes", 2, "--batch-size", 4)
    ran = run_llmctl(*arguments)
    assert ran.returncode == 0, ran.stderr
    assert_same_metrics(lines_of(tmp_path / "run"), whole(SFT).lines, 1e-5)


@pytest.mark.parametrize("objective", [*OBJECTIVES, DROPPING], ids=str)
def test_an_interrupted_run_resumes_in_the_same_bits(train, at_pass, tmp_path, objective):
    """Between two lines of metrics, so that what the next line counts comes back as well."""
    flags = ("--log-every", 2, "--max-steps", 5, "--eval-every", 5)
    undisturbed, cut = tmp_path / "undisturbed", tmp_path / "cut"
    assert train(objective, undisturbed, *flags).code == 0
    at_pass(3, lambda output: os.kill(os.getpid(), signal.SIGINT))
    stopped = train(objective, cut, *flags)
    assert stopped.code == 130, stopped.err
    assert [path.name for path in (cut / "checkpoints").iterdir()].count("checkpoint-3") == 1
    assert not (cut / "model").exists()
    resumed = train(objective, cut, *flags, "--resume")
    assert resumed.code == 0, resumed.err
    assert "checkpoint-3" in resumed.err
    assert sha256_file(result_of(cut)) == sha256_file(result_of(undisturbed))
    assert lines_of(cut) == lines_of(undisturbed)


@every_objective
def test_a_killed_run_resumes_in_the_same_bits(train, whole, tmp_path, objective):
    """From a checkpoint that is older than the last line of metrics."""
    cut = cut_off(whole(objective).out, tmp_path / "cut", 2)
    resumed = train(objective, cut, "--resume")
    assert resumed.code == 0, resumed.err
    assert "checkpoint-2" in resumed.err
    assert sha256_file(result_of(cut)) == sha256_file(result_of(whole(objective).out))
    assert lines_of(cut) == whole(objective).lines


@every_objective
def test_a_bad_number_ends_the_run_before_it_is_used(train, at_pass, whole, tmp_path, objective):
    before = [line for line in whole(objective).lines if line["step"] < 3]
    at_pass(3, lambda output: output * torch.nan)
    result = train(objective, tmp_path / "run")
    assert result.code == 7, result.err
    assert "step 3: loss nan" in result.err
    assert "(sequences " in result.err or "(examples " in result.err, "which batch?"
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "diverged"
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["checkpoint-2"]
    assert not (tmp_path / "run" / "model").exists()
    assert lines_of(tmp_path / "run") == before


@every_objective
def test_a_step_with_a_bad_number_is_skipped_on_request(train, at_pass, tmp_path, objective):
    at_pass(3, lambda output: output * torch.nan)
    result = train(objective, tmp_path / "run", "--on-nan", "skip")
    assert result.code == 0, result.err
    assert "skipped step 3" in result.err
    lines = lines_of(tmp_path / "run")
    assert lines[-2]["skipped_steps"] == 1
    assert math.isfinite(lines[-1]["val_loss"])
    weights = load_file(result_of(tmp_path / "run"))
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())


@every_objective
def test_the_largest_batch_that_fits_changes_no_result(
    train, whole, monkeypatch, tmp_path, objective
):
    """Memory for two rows at a time; the step keeps its size."""
    wanted = whole(objective).lines
    monkeypatch.setattr(probe, "_fits", partial(fits_two, probe._fits))
    result = train(objective, tmp_path / "run", "--find-batch-size")
    assert result.code == 0, result.err
    assert "batch size 2 of 8 fits" in result.err
    plan = json.loads((tmp_path / "run" / "manifest.json").read_text())["plan"]
    assert (plan["batch_size"], plan["grad_accum"]) == (2, 4)
    assert_same_metrics(lines_of(tmp_path / "run"), wanted, 1e-5)


def fits_two(fits, step, size, device):
    return fits(step, size, device) and size <= 2


@every_objective
def test_speed_and_utilisation_are_told(train, whole, monkeypatch, tmp_path, objective):
    """Utilisation only where the peak of the device is known."""
    for line in (whole(objective).out / "metrics.jsonl").read_text().splitlines():
        figures = json.loads(line)
        assert "loss" not in figures or figures["mfu"] is None
    monkeypatch.setattr(hardware, "peak_flops", lambda *_: 1e9)
    result = train(objective, tmp_path / "run", "--max-steps", 2)
    assert result.code == 0, result.err
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [figures for figures in map(json.loads, lines) if "loss" in figures]
    assert len(steps) == 2
    for figures in steps:
        assert figures["tokens_per_second"] > 0
        assert figures["mfu"] > 0
    final = json.loads((tmp_path / "run" / "manifest.json").read_text())["result"]
    assert final["tokens_per_second"] > 0
    assert final["mfu"] > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@every_objective
def test_a_compiled_model_learns_the_same(train, tmp_path, objective):
    """One layer, one step and nothing held out, since all else is compiled once more.

    sft takes a second step: its rows have another length.
    """
    single, steps = replace(objective, model="llama-1"), 1 + (objective is SFT)
    held_out = () if objective.name == "pretrain" else ("--val-size", 0)
    for name, more in (("eager", ()), ("compiled", ("--compile",))):
        torch._dynamo.reset()
        counters.clear()
        result = train(single, tmp_path / name, "--max-steps", steps, *held_out, *more)
        assert result.code == 0, result.err
        assert bool(counters["inductor"]) == (name == "compiled")
    assert_same_metrics(lines_of(tmp_path / "compiled"), lines_of(tmp_path / "eager"), 1e-4)

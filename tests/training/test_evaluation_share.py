"""By default evaluation is at most a tenth of a run, counted in forward tokens."""

import json

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook

from llmctl.training import loop
from tests.run_files import metrics, write_rows
from tests.training.objectives import PRETRAIN, RECORDER, SFT, every_objective

PAD = RECORDER.VOCABULARY.index("[PAD]")


@pytest.fixture
def read(monkeypatch):
    """Tokens that a model reads while a run steps: of evaluation, and of training times three."""
    counted = {"evaluation": 0, "training": 0}

    def hook(module, arguments, output):
        if not isinstance(module, torch.nn.Embedding):
            return
        if module.num_embeddings == len(RECORDER.VOCABULARY):
            tokens = int((arguments[0] != PAD).sum())
            kind = "training" if module.training else "evaluation"
            counted[kind] += tokens * (3 if torch.is_grad_enabled() else 1)

    fit = loop.fit

    def watched(trainer):
        handle = register_module_forward_hook(hook)
        try:
            return fit(trainer)
        finally:
            handle.remove()

    monkeypatch.setattr(loop, "fit", watched)
    return counted


def open_arguments(objective, inputs, out, *more):
    """The command line of a run that leaves open how it evaluates."""
    line = objective.arguments(inputs, out, *more)
    for flag in ("--eval-every", "--val-size", "--samples"):
        if flag in line[: len(line) - len(more)]:
            del line[line.index(flag) : line.index(flag) + 2]
    return line


def evaluated_at(out):
    return [line["step"] for line in metrics(out) if "val_loss" in line]


def plan_of(out):
    return json.loads((out / "manifest.json").read_text())["plan"]


@every_objective
def test_what_is_read_is_at_most_a_tenth(cli, inputs, read, tmp_path, objective):
    """Of what the model reads from the first step to the last, padding left out."""
    out, steps = tmp_path / "run", 80 if objective is PRETRAIN else 10
    result = cli(*open_arguments(objective, inputs, out, "--max-steps", steps))
    assert result.code == 0, result.err
    plan, evaluated = plan_of(out), evaluated_at(out)
    assert evaluated[-1] == steps
    assert len(evaluated) == plan["evaluations"] < 10
    assert 0 < read["evaluation"] <= (read["evaluation"] + read["training"]) / 10
    assert plan["evaluation_share"] <= 0.1
    told = f"{100 * plan['evaluation_share']:.2g} % of the run's work"
    assert told in result.err


def test_a_long_run_evaluates_ten_times_as_before(cli, inputs, tmp_path):
    out = tmp_path / "run"
    flags = ("--max-steps", 300, "--batch-size", 32, "--samples", 0)
    result = cli(*open_arguments(PRETRAIN, inputs, out, *flags))
    assert result.code == 0, result.err
    assert evaluated_at(out) == list(range(30, 301, 30))


@pytest.mark.parametrize(
    ("objective", "flags", "steps", "rows"),
    [
        pytest.param(SFT, ("--eval-every", 1, "--val-size", 12), [1, 2, 3], None, id="every"),
        pytest.param(SFT, ("--eval-every", 2), [2, 3], None, id="every, rows held out by default"),
        pytest.param(SFT, ("--val-size", 12), [3], None, id="rows"),
        pytest.param(PRETRAIN, ("--eval-every", 1), [1, 2, 3], 131_072, id="windows by default"),
        pytest.param(PRETRAIN, ("--eval-tokens", 0), [3], 0, id="all windows"),
        pytest.param(PRETRAIN, ("--eval-tokens", 32), [3], 32, id="two windows"),
    ],
)
def test_what_flags_say_stays(cli, inputs, tmp_path, objective, flags, steps, rows):
    out = tmp_path / "run"
    result = cli(*open_arguments(objective, inputs, out, *flags, "--max-steps", 3))
    assert result.code == 0, result.err
    plan = plan_of(out)
    assert evaluated_at(out) == steps
    assert plan["eval_rows" if objective is SFT else "eval_tokens"] == rows


def test_a_short_run_reads_part_of_what_was_held_out(cli, inputs, read, tmp_path):
    """And says so: on how many of how many, and that it keeps to a tenth."""
    out, flags = tmp_path / "run", ("--max-steps", 2, "--batch-size", 1, "--samples", 0)
    result = cli(*open_arguments(SFT, inputs, out, *flags))
    assert result.code == 0, result.err
    plan = plan_of(out)
    held_out = json.loads((out / "manifest.json").read_text())["held_out"]
    assert 1 <= plan["eval_rows"] < len(held_out)
    assert read["evaluation"] == plan["evaluation_tokens"]
    assert f"evaluation on {plan['eval_rows']:,} of {len(held_out)} rows" in result.err


def test_patience_keeps_all_evaluations(cli, inputs, tmp_path):
    """`--early-stop` counts them: each reads fewer rows instead."""
    out, flags = tmp_path / "run", ("--max-steps", 10, "--batch-size", 1, "--samples", 0)
    result = cli(*open_arguments(SFT, inputs, out, *flags, "--early-stop", 9))
    assert result.code == 0, result.err
    plan = plan_of(out)
    assert (plan["evaluations"], plan["eval_rows"]) == (10, 1)


@pytest.mark.parametrize("flags", [(), ("--val-size", 12)], ids=["by default", "a number given"])
def test_ppo_reads_held_out_prompts_by_the_same_rule(cli, base, tmp_path, flags):
    """A held-out episode is read by policy and reference once more than it is sampled."""
    rows = [{"prompt": f"The old cat sees number {n}"} for n in range(40)]
    data = write_rows(tmp_path / "prompts.jsonl", rows)
    out = tmp_path / "run"
    how = ("--plain", "--reward-rule", "length:4", "--max-new-tokens", 8, "--threads", 1)
    size = ("--batch-size", 8, "--minibatches", 1, "--ppo-epochs", 1, "--max-steps", 2)
    result = cli("ppo", "--model", base, "--data", data, *how, *size, *flags, "-o", out)
    assert result.code == 0, result.err
    plan = plan_of(out)
    read = [line["val_prompts"] for line in metrics(out) if "val_prompts" in line]
    assert read == ([12] if flags else [1, 1])
    assert plan["eval_rows"] == (None if flags else 1)
    # 16 episodes are sampled, read twice and trained on: 6 passes; those held out take 3, and one
    # more for the reference's responses to all of them
    held_out, total = (12, 12) if flags else (2 * 1, 4)
    lengths = plan["training_tokens"] / (16 * 6)
    expected = (3 * held_out + total) / (3 * held_out + total + 96)
    assert lengths == pytest.approx(8 + 17, abs=2), "tokens of an episode"
    assert plan["evaluation_share"] == pytest.approx(expected, rel=0.05)

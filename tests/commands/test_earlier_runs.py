"""Runs that commit 50552fc left: the finished are read and used, the unfinished resumed or refused.

`tests/fixtures/runs-50552fc/README.md` says how they were made.
"""

import html
import json
import re
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest
from safetensors.torch import load_file

from llmctl.files import sha256_file
from tests.run_files import edit_json, metrics

RUNS = Path(__file__).parents[1] / "fixtures" / "runs-50552fc"
EXPECTED = json.loads((RUNS / "expected.json").read_text())
FINISHED = {
    "tokenize": "tokenize",
    "pretrain": "pretrain",
    "sft": "sft",
    "sft-lora": "sft",
    "classify": "sft",
    "reward": "reward",
    "dpo": "dpo",
    "ppo": "ppo",
    "quantize": "quantize",
}
"""Run directories by the command that made them."""
UNFINISHED = ("sft-cut", "classify-cut", "reward-cut", "dpo-cut")
WRITERS = ("pretrain", "sft", "sft-lora", "dpo", "ppo", "quantize")
"""Those whose model writes text."""
DECIDING = ("torch", "transformers", "accelerate", "numpy")
"""Packages whose versions decide the last bits."""


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A copy of the runs, as working directory: their paths are relative to it."""
    copy = tmp_path / "runs"
    shutil.copytree(RUNS, copy)
    adapter = copy / "sft-lora" / "adapter" / "adapter_config.json"
    edit_json(adapter, base_model_name_or_path=str(copy / "pretrain" / "model"))
    monkeypatch.chdir(copy)
    return copy


def steps_of(rows, names):
    """Figures of these names of each line of metrics."""
    return [{name: row[name] for name in names if name in row} for row in rows]


def test_runs_lists_all_of_them(cli, runs):
    result = cli("runs", "--json")
    assert result.code == 0, result.err
    listed = {Path(row["path"]).name: row for row in json.loads(result.out)["runs"]}
    assert set(listed) == {*FINISHED, "pretrain-cut", *UNFINISHED}
    for name, command in FINISHED.items():
        assert (listed[name]["stage"], listed[name]["status"]) == (command, "completed")
    for name in ("pretrain-cut", *UNFINISHED):
        assert (listed[name]["status"], listed[name]["step"]) == ("preempted", 6)
    assert listed["pretrain"]["val_loss"] == pytest.approx(5.3157, abs=1e-4)


def test_report_tells_of_all_of_them(cli, runs):
    result = cli("report", ".", "-o", "page.html")
    assert result.code == 0, result.err
    page = (runs / "page.html").read_text()
    body = re.sub(r"<(style|script)\b.*?</\1>", "", page, flags=re.DOTALL)
    text = " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())
    assert "14 runs, 9 completed, 5 preempted" in text
    for told in (
        *("tokenize 7,844 tokens", "pretrain 5.316 nats", "sft 5.159 nats", "sft-lora 5.338 nats"),
        *("classify 0.726 nats", "reward 100 % accuracy", "dpo 0.679 nats", "ppo 50 % wins"),
        "quantize 202.9 perplexity",
    ):
        assert told in text


@pytest.mark.parametrize("name", WRITERS)
def test_a_model_writes_text(cli, runs, name):
    result = cli("generate", "--model", name, "--prompt", "the cat", "--max-tokens", 4, "--greedy")
    assert result.code == 0, result.err


def test_a_classifier_and_a_reward_model_are_used(cli, runs):
    scored = cli("reward", "--model", "reward", "--score", "pairs.jsonl", "-o", "scores")
    assert scored.code == 0, scored.err
    result = cli("evaluate", "--model", "classify", "--data", "texts.jsonl", "-o", "told")
    assert result.code == 0, result.err


def test_an_adapter_is_merged(cli, runs):
    result = cli("merge", "--model", "sft-lora", "-o", "merged")
    assert result.code == 0, result.err
    merged, base = (
        load_file(runs / name / "model" / "model.safetensors") for name in ("merged", "pretrain")
    )
    layer = next(name for name in merged if name.endswith("q_proj.weight"))
    assert merged[layer].shape == base[layer].shape
    assert not merged[layer].equal(base[layer])


@pytest.mark.parametrize("name", FINISHED)
def test_a_recipe_is_taken_again(cli, runs, name):
    """`-c` of the run's own recipe, as the run left it."""
    command = FINISHED[name]
    result = cli(command, "-c", f"{name}/recipe.yaml", "--dry-run", "-o", "again")
    assert result.code == 0, result.err
    assert not (runs / "again").exists()


@pytest.mark.parametrize("name", ["sft", "classify", "reward", "dpo"])
def test_a_recipe_repeated_learns_the_same(cli, runs, name):
    """To rounding: the sum of the losses is divided where the losses were divided before."""
    result = cli(FINISHED[name], "-c", f"{name}/recipe.yaml", "-o", "again")
    assert result.code == 0, result.err
    names = ("step", "tokens", "loss", "lr", "grad_norm", "val_loss", "accuracy", "token_accuracy")
    then, now = (steps_of(metrics(runs / run), names) for run in (name, "again"))
    assert len(then) == len(now)
    for before, after in zip(then, now, strict=True):
        assert after == pytest.approx(before, rel=1e-4)


def test_an_unfinished_pretraining_ends_in_the_recorded_bits(cli, runs):
    known = EXPECTED["runs"]["pretrain-cut"]
    result = cli(*known["command"][1:])
    assert result.code == 0, result.err
    assert "resuming from" in result.err
    names = [*known["metrics"][0], "val_loss", "val_perplexity", "val_bits_per_byte"]
    lines = steps_of(metrics(runs / "pretrain-cut"), names)
    made_with = EXPECTED["versions"]
    if all(version(package) == made_with[package] for package in DECIDING):
        for file, digest in known["sha256"].items():
            assert sha256_file(runs / "pretrain-cut" / file) == digest, file
        assert lines == known["metrics"]
    else:
        assert len(lines) == len(known["metrics"])
        for line, wanted in zip(lines, known["metrics"], strict=True):
            assert line == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("name", UNFINISHED)
def test_unfinished_fine_tuning_is_refused_in_words(cli, runs, name):
    run = runs / name
    before = {file: sha256_file(file) for file in run.rglob("checkpoint-6/*")}
    result = cli(*EXPECTED["runs"][name]["command"][1:])
    assert result.code == 4, result.err
    assert "earlier version" in result.err
    assert "start anew" in result.err
    assert {file: sha256_file(file) for file in run.rglob("checkpoint-6/*")} == before
    assert not (run / "model").exists()


@pytest.mark.parametrize("name", UNFINISHED)
def test_what_is_refused_starts_anew(cli, runs, name):
    command = EXPECTED["runs"][name]["command"]
    anew = ["--overwrite" if word == "--resume" else word for word in command[1:]]
    result = cli(*anew)
    assert result.code == 0, result.err
    assert max(row["step"] for row in metrics(runs / name)) == 12

"""What pretrain does about bad numbers, memory, changed settings and a full disk."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import SMALL, out_of_memory
from tests.run_files import cut_off, digest, manifest, metrics

STEPS = ("--max-steps", 12, "--save-every", 4, "--eval-every", 6, "--keep", 9, "--threads", 1)


@pytest.fixture
def train(cli, tokens):
    """`train(out, "--resume")` runs pretrain on the tokens."""

    def run(out, *flags):
        return cli("pretrain", "--tokens", tokens, *SMALL, *STEPS, "-o", out, *flags)

    return run


def spoil(monkeypatch, *steps):
    """Make the gradients of these steps NaN, and count the passes."""
    from llmctl.training import loop

    compute, passes = loop.accumulate, []

    def spoiled(trainer, batch):
        loss = compute(trainer, batch)
        passes.append(trainer.state.progress.step + 1)
        if passes[-1] in steps:
            next(trainer.model.parameters()).grad[0] = torch.nan
        return loss

    monkeypatch.setattr(loop, "accumulate", spoiled)
    return passes


# --- NaN


def test_nan_in_a_gradient_stops_before_the_update(train, tmp_path, monkeypatch):
    passes = spoil(monkeypatch, 6)
    result = train(tmp_path / "run")
    assert result.code == 7
    assert "step 6: loss " in result.err
    assert "gradient norm nan (sequences 40 to 47)" in result.err
    assert passes == [1, 2, 3, 4, 5, 6]
    saved = load_file(tmp_path / "run/checkpoints/checkpoint-4/model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in saved.values())


def test_skipping_counts_and_changes_nothing_in_that_step(train, tmp_path, monkeypatch):
    spoil(monkeypatch, 5, 7)
    result = train(tmp_path / "run", "--on-nan", "skip", "--save-every", 1, "--keep", 20)
    assert result.code == 0
    assert "skipped step 5: " in result.err
    assert metrics(tmp_path / "run")[-2]["skipped_steps"] == 2
    assert manifest(tmp_path / "run")["result"]["skipped_steps"] == 2
    folders = tmp_path / "run" / "checkpoints"
    before, after, later = (
        load_file(folders / f"checkpoint-{step}" / "model.safetensors") for step in (4, 5, 6)
    )
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not all(torch.equal(after[name], later[name]) for name in after)


def test_skipping_has_a_limit(train, tmp_path, monkeypatch):
    spoil(monkeypatch, 3, 5, 6)
    result = train(tmp_path / "run", "--on-nan", "skip", "--max-nan-skips", 2)
    assert result.code == 7
    assert "3 skipped, more than --max-nan-skips 2" in result.err


def test_a_diverged_run_goes_on_with_skip(train, tmp_path, monkeypatch):
    spoil(monkeypatch, 6)
    assert train(tmp_path / "run").code == 7
    result = train(tmp_path / "run", "--resume", "--on-nan", "skip")
    assert result.code == 0, result.err
    assert "checkpoint-4" in result.err


def test_a_limit_without_skip_is_refused(train, tmp_path):
    result = train(tmp_path / "run", "--max-nan-skips", 2)
    assert result.code == 2
    assert "goes with --on-nan skip" in result.err


# --- memory


def test_the_largest_batch_that_fits_keeps_the_step(train, tmp_path, monkeypatch):
    """A machine whose memory ends at more than two sequences trains in passes of two."""
    from llmctl.training.pretrain import LanguageModelling

    compute, tried = LanguageModelling.loss, []

    def limited(self, model, batch):
        tried.append(len(batch["input_ids"]))
        if tried[-1] > 2:
            out_of_memory()
        return compute(self, model, batch)

    monkeypatch.setattr(LanguageModelling, "loss", limited)
    result = train(tmp_path / "found", "--find-batch-size")
    assert result.code == 0, result.err
    assert tried[:3] == [1, 2, 4]
    assert set(tried[3:]) == {2}
    assert "batch size 2 of 8 fits" in result.err
    plan = manifest(tmp_path / "found")["plan"]
    assert (plan["batch_size"], plan["grad_accum"]) == (2, 4)
    assert train(tmp_path / "given", "--batch-size", 2, "--grad-accum", 4).code == 0
    assert digest(tmp_path / "found") == digest(tmp_path / "given")


def test_a_resumed_run_keeps_the_batch_it_found(train, tmp_path, monkeypatch):
    from llmctl.training import pretrain

    monkeypatch.setattr(pretrain, "largest_batch", lambda *_: 4)
    assert train(tmp_path / "whole", "--find-batch-size").code == 0
    cut_off(tmp_path / "whole", tmp_path / "again", 8)
    monkeypatch.setattr(pretrain, "largest_batch", lambda *_: 1)
    result = train(tmp_path / "again", "--find-batch-size", "--resume")
    assert result.code == 0, result.err
    assert digest(tmp_path / "again") == digest(tmp_path / "whole")


def test_not_even_one_sequence_fits(train, tmp_path, monkeypatch):
    from llmctl.training.pretrain import LanguageModelling

    monkeypatch.setattr(LanguageModelling, "loss", out_of_memory)
    result = train(tmp_path / "run", "--find-batch-size")
    assert result.code == 5
    assert "out of memory with a single sequence" in result.err
    assert not (tmp_path / "run").exists()


# --- settings that change half-way


def test_a_change_is_refused_named_and_allowed(train, tmp_path):
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert train(whole).code == 0
    cut_off(whole, again, 4)
    for flags, named in (
        (("--lr", 0.001), "lr: 0.0"),
        (("--seed", 3), "seed: 0 -> 3"),
        (("--heads", 1), "num_attention_heads: 2 -> 1"),
        (("--max-steps", 20), "max_steps: 12 -> 20"),
        (("--batch-size", 4, "--grad-accum", 2), "batch_size: 8 -> 4, grad_accum: 1 -> 2"),
    ):
        result = train(again, *flags, "--resume")
        assert result.code == 4, result.err
        assert named in result.err
    result = train(again, "--max-steps", 20, "--resume", "--resume-allow", "max-steps")
    assert result.code == 0, result.err
    assert manifest(again)["resumed"]["changed"]["max_steps"] == [12, 20]
    assert manifest(again)["result"]["step"] == 20
    result = train(tmp_path / "x", "--heads", 1, "--resume", "--resume-allow", "architecture")
    assert result.code == 0, "there is nothing to resume: a fresh start"


def test_other_data_and_another_tokenizer_are_refused(cli, train, tokens, corpus, tmp_path):
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert train(whole).code == 0
    cut_off(whole, again, 4)
    changed = tmp_path / "changed.jsonl"
    changed.write_text(corpus.read_text().replace("cat", "cow", 1))
    other = tmp_path / "other"
    made = cli("tokenize", "--data", changed, "--tokenizer", tokens, "-o", other)
    assert made.code == 0, made.err
    result = train(again, "--tokens", other, "--resume")
    assert result.code == 4
    assert "tokens: " in result.err
    assert cli("tokenize", "--data", corpus, "--vocab-size", 300, "-o", tmp_path / "t").code == 0
    result = train(again, "--tokens", tmp_path / "t", "--resume")
    assert result.code == 4
    assert "tokenizer: " in result.err


def test_a_checkpoint_beyond_the_last_step_is_refused(train, tmp_path):
    assert train(tmp_path / "whole").code == 0
    cut_off(tmp_path / "whole", tmp_path / "again", 8)
    flags = ("--max-steps", 6, "--resume", "--resume-allow", "max_steps")
    result = train(tmp_path / "again", *flags)
    assert result.code == 2
    assert "--max-steps 6: checkpoint-8 is beyond it" in result.err


def test_an_older_checkpoint_of_the_same_run_starts_a_branch(train, tmp_path):
    """What lies ahead of it is of the branch that was left, and must not come back."""
    assert train(tmp_path / "whole").code == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    (tmp_path / "again" / "status.json").write_text('{"state": "failed"}')
    folder = tmp_path / "again" / "checkpoints"
    flags = ("--lr", 0.0001, "--resume-allow", "lr", "--save-every", 5)
    result = train(tmp_path / "again", "--resume-from", folder / "checkpoint-4", *flags)
    assert result.code == 0, result.err
    steps = {int(path.name.split("-")[1]) for path in folder.iterdir()}
    assert steps == {4, 5, 6, 10, 12}
    assert digest(tmp_path / "again") != digest(tmp_path / "whole")


def test_its_own_newest_goes_before_the_named_one(train, tmp_path):
    """So that a requeued job can be given both flags each time."""
    assert train(tmp_path / "first").code == 0
    cut_off(tmp_path / "first", tmp_path / "second", 8)
    named = tmp_path / "first" / "checkpoints" / "checkpoint-4"
    result = train(tmp_path / "second", "--resume", "--resume-from", named)
    assert result.code == 0, result.err
    assert "second/checkpoints/checkpoint-8" in result.err
    result = train(tmp_path / "third", "--resume", "--resume-from", named)
    assert "resuming from " + str(named) in result.err
    assert digest(tmp_path / "second") == digest(tmp_path / "first")


def test_other_surroundings_are_said(train, tmp_path, monkeypatch):
    assert train(tmp_path / "whole").code == 0
    cut_off(tmp_path / "whole", tmp_path / "again", 8)
    result = train(tmp_path / "again", "--resume")
    assert "not the same to the last bit" not in result.err
    cut_off(tmp_path / "whole", tmp_path / "elsewhere", 8)
    result = train(tmp_path / "elsewhere", "--resume", "--threads", 2)
    assert result.code == 0
    assert "threads: 1 -> 2: not the same to the last bit" in result.err


# --- time and disk


def test_time_and_metrics_go_on_where_they_were(train, tmp_path):
    assert train(tmp_path / "whole").code == 0
    cut_off(tmp_path / "whole", tmp_path / "again", 8)
    assert train(tmp_path / "again", "--resume").code == 0
    times = [row["time"] for row in metrics(tmp_path / "again")]
    assert times == sorted(times)
    assert times[-1] > times[0]


def test_resuming_at_the_last_step_reports_what_was_measured(train, tmp_path):
    assert train(tmp_path / "whole").code == 0
    before = manifest(tmp_path / "whole")["result"]
    cut_off(tmp_path / "whole", tmp_path / "again", 12)
    result = train(tmp_path / "again", "--resume", "--json")
    found = json.loads(result.out)
    assert found["loss"] == before["loss"]
    assert found["val_loss"] == before["val_loss"]
    assert found["tokens_per_second"] > 0
    assert digest(tmp_path / "again") == digest(tmp_path / "whole")


def test_a_disk_that_cannot_hold_the_run_is_refused_before_it(train, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=900_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    result = train(tmp_path / "run")
    assert result.code == 5
    assert "bytes needed, 900,000 bytes free" in result.err
    assert not (tmp_path / "run").exists()


# --- what a fresh eye found


def test_other_text_is_refused_on_resume(cli, tokens, corpus, tmp_path):
    """Also where the tokens of the run are there already."""
    out = tmp_path / "run"
    common = ("pretrain", "--tokenizer", tokens, *SMALL, *STEPS, "-o", out)
    assert cli(*common, "--data", corpus).code == 0
    (out / "status.json").write_text('{"state": "failed"}')
    (out / "checkpoints" / "checkpoint-12" / "state.json").unlink()
    other = tmp_path / "other.jsonl"
    other.write_text(corpus.read_text().replace("cat", "cow", 1))
    for flags, name in (
        (("--data", other), "data: "),
        (("--data", corpus, "--val-fraction", 0.3), "val_fraction: None -> 0.3"),
    ):
        result = cli(*common, *flags, "--resume")
        assert result.code == 4, result.err
        assert f"the run began with other data ({name}" in result.err
    result = cli(*common, "--data", corpus, "--resume")
    assert result.code == 0, result.err


def test_weights_that_the_last_update_ruined_are_not_a_result(train, tmp_path):
    flags = ("--lr", 1e39, "--warmup", 0, "--optimizer", "adamw")
    result = train(tmp_path / "run", "--max-steps", 1, *flags)
    assert result.code == 7, result.err
    assert "not finite after the update" in result.err or "val_loss" in result.err
    assert not (tmp_path / "run" / "model").exists()


def test_finding_a_batch_does_not_hide_that_it_changed(train, tmp_path):
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert train(whole).code == 0
    cut_off(whole, again, 4)
    result = train(again, "--batch-size", 6, "--find-batch-size", "--resume")
    assert result.code == 4
    assert "batch_size: 8 -> 6" in result.err


def test_another_effective_batch_is_said(train, tmp_path):
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert train(whole).code == 0
    cut_off(whole, again, 4)
    flags = ("--resume", "--resume-allow", "batch_size,grad_accum")
    result = train(again, "--batch-size", 4, "--grad-accum", 2, *flags)
    assert result.code == 0, result.err
    assert "another effective batch" not in result.err
    shutil.rmtree(again)
    cut_off(whole, again, 4)
    result = train(again, "--batch-size", 4, *flags)
    assert "another effective batch" in result.err


def test_a_resumed_run_keeps_nothing_of_a_deleted_checkpoint_open(train, tmp_path):
    from llmctl.runs.resume import load

    assert train(tmp_path / "whole").code == 0
    content = load(tmp_path / "whole" / "checkpoints" / "checkpoint-12")
    assert "checkpoint-12" not in Path("/proc/self/maps").read_text()
    assert content.model


@pytest.mark.parametrize(
    ("limit", "usage", "cached"),
    [
        ("memory.max", "memory.current", "inactive_file 300\n"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file 300\nx 1\n"),
    ],
)
def test_a_jobs_own_limit_counts_and_cached_files_do_not(
    tmp_path, monkeypatch, limit, usage, cached
):
    from llmctl import hardware

    (tmp_path / limit).write_text("1000\n")
    (tmp_path / usage).write_text("700\n")
    (tmp_path / "memory.stat").write_text(cached)
    monkeypatch.setattr(hardware, "_memory_cgroups", lambda: [tmp_path])
    assert hardware.memory_left() == 600
    assert hardware.memory_total() == 1000
    (tmp_path / limit).write_text("max\n")
    assert hardware.memory_left() > 10**6

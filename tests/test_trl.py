"""TRL's trainers under the mixin: resume is exact whatever the data, and refusals."""

import json
import re
import shutil
from types import SimpleNamespace

import bare_trainer
import pytest
import torch
import trl
from safetensors.torch import load_file

from llmctl.errors import UserError
from llmctl.files import sha256_file
from llmctl.training.order import Order, Stream, token_lengths
from llmctl.training.trl import Reliable

STEPS = ("--max-steps", 10, "--save-every", 3, "--eval-every", 4, "--keep", 9)
WAYS = {
    "epochs": ("--rows", 14),
    "grouped": ("--group-by-length", "--rows", 22),
    "streaming": ("--streaming", "--rows", 14, "--grad-accum", 2),
    "without evaluation": ("--no-eval",),
}
PAIRS = {"reward": "--lora", "dpo": "--group-by-length"}
"""TRL's trainers on pairs of answers, each with something else that must not break them."""


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    torch.set_num_threads(1)


@pytest.fixture
def train(capsys):
    """Run it: `train(out, "--resume")` -> code, stderr."""

    def run(out, *flags):
        code = bare_trainer.main([str(flag) for flag in ("-o", out, *flags)])
        return code, capsys.readouterr().err

    return run


def digest(run):
    return sha256_file(run / "model" / "model.safetensors")


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def cut(whole, to, after):
    """A run that was killed after the checkpoint of this step."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(whole, to, ignore=shutil.ignore_patterns("model"))
    (to / "status.json").write_text('{"state": "running"}')
    for path in (to / "checkpoints").iterdir():
        if int(path.name.split("-")[1]) > after:
            shutil.rmtree(path)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_resume_from_every_checkpoint_ends_in_the_same_bits(train, tmp_path, way):
    run = (*STEPS, *WAYS[way])
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert train(whole, *run)[0] == 0
    steps = sorted(int(p.name.split("-")[1]) for p in (whole / "checkpoints").iterdir())
    assert len(steps) >= 4
    for step in steps[:-1]:
        cut(whole, again, step)
        code, err = train(again, *run, "--resume")
        assert code == 0, err
        assert f"checkpoint-{step}" in err
        assert digest(again) == digest(whole), f"from step {step}"
        ours, theirs = metrics(again), metrics(whole)
        assert [(r["step"], r.get("loss")) for r in ours] == [
            (r["step"], r.get("loss")) for r in theirs
        ]


@pytest.mark.slow
@pytest.mark.parametrize("more", [False, True], ids=["plain", "more"])
@pytest.mark.parametrize("kind", PAIRS)
def test_trainers_on_pairs_resume_in_the_same_bits(train, tmp_path, kind, more):
    run = ("--kind", kind, "--max-steps", 6, "--save-every", 3, "--eval-every", 4, "--keep", 9)
    run += (PAIRS[kind],) if more else ()
    whole, again = tmp_path / "whole", tmp_path / "again"
    code, err = train(whole, *run)
    assert code == 0, err
    cut(whole, again, 3)
    code, err = train(again, *run, "--resume")
    assert code == 0, err
    assert "checkpoint-3" in err
    assert digest(again) == digest(whole)
    assert metrics(again)[-1]["val_loss"] == metrics(whole)[-1]["val_loss"]


def test_it_learns_and_evaluation_changes_nothing(train, tmp_path):
    for name, more in (("with", ()), ("without", ("--no-eval",))):
        assert train(tmp_path / name, *STEPS, *more)[0] == 0
    losses = [row["loss"] for row in metrics(tmp_path / "with") if "loss" in row]
    assert losses[-1] < losses[0] / 1.25
    assert digest(tmp_path / "with") == digest(tmp_path / "without")


def test_only_what_trains_is_saved(train, tmp_path):
    assert train(tmp_path / "run", *STEPS, "--lora")[0] == 0
    saved = load_file(tmp_path / "run/checkpoints/checkpoint-10/model.safetensors")
    assert saved
    assert all("lora" in name for name in saved)


def test_another_run_is_refused_with_the_difference(train, tmp_path):
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert train(whole, *STEPS)[0] == 0
    cut(whole, again, 3)
    for flags, named in (
        (("--lr", 0.5), "lr: 0.01 -> 0.5"),
        (("--rows", 50), "data: 60 -> 50"),
        (("--seed", 1), "seed: 0 -> 1"),
        (("--hidden", 64), "hidden_size: 32 -> 64"),
        (("--lora",), "adapter: [] -> "),
        (("--group-by-length",), "group_by_length: False -> True"),
    ):
        code, err = train(again, *STEPS, *flags, "--resume")
        assert code == 4, err
        assert named in err
    code, err = train(again, *STEPS, "--lr", 0.5, "--resume", "--resume-allow", "lr")
    assert code == 0, err
    assert "lr: 0.01 -> 0.5 from step 3 on" in err
    record = json.loads((again / "manifest.json").read_text())["resumed"]
    assert record["changed"] == {"lr": [0.01, 0.5]}
    assert digest(again) != digest(whole)


def test_data_without_labels_is_refused_and_named_in_short(train, tmp_path):
    code, err = train(tmp_path / "run", *STEPS, "--masked")
    assert code == 3
    assert not (tmp_path / "run/checkpoints").exists()
    assert re.search(r"step 1: every label is masked \(examples (\d+, ){3}\d+\)", err)
    code, err = train(tmp_path / "large", *STEPS, "--masked", "--grad-accum", 5)
    assert re.search(r"masked \(examples (\d+, ){7}\d+ and 12 more\)", err)


def test_examples_are_named_only_where_a_step_is_refused(train, tmp_path, monkeypatch):
    def never(trainer):
        raise AssertionError("nobody asked")

    monkeypatch.setattr(Reliable, "_named", never)
    assert train(tmp_path / "run", "--max-steps", 2)[0] == 0


def test_several_validation_sets_are_refused(train, tmp_path, monkeypatch):
    whole = trl.SFTTrainer.__init__

    def split(trainer, *args, eval_dataset, **kwargs):
        whole(trainer, *args, eval_dataset={"a": eval_dataset, "b": eval_dataset}, **kwargs)

    monkeypatch.setattr(trl.SFTTrainer, "__init__", split)
    code, err = train(tmp_path / "run", *STEPS)
    assert (code, "one data set" in err) == (2, True), err


def test_only_the_prefix_of_a_metric_is_renamed(train, tmp_path, monkeypatch):
    found = {"eval_loss": 1.0, "eval_medieval_loss": 2.0}
    monkeypatch.setattr(trl.SFTTrainer, "evaluate", lambda trainer: found)
    assert train(tmp_path / "run", "--max-steps", 4)[0] == 0
    assert metrics(tmp_path / "run")[-1]["val_medieval_loss"] == 2


def test_resuming_keeps_nothing_of_the_checkpoint_in_memory(train, tmp_path, monkeypatch):
    seen = []
    step = Reliable.training_step

    def watched(trainer, *args, **kwargs):
        seen.append(trainer._content)
        return step(trainer, *args, **kwargs)

    assert train(tmp_path / "run", *STEPS)[0] == 0
    cut(tmp_path / "run", tmp_path / "again", 3)
    monkeypatch.setattr(Reliable, "training_step", watched)
    assert train(tmp_path / "again", *STEPS, "--resume")[0] == 0
    assert seen == [None] * 7


def test_under_fsdp_trainer_reads_no_checkpoint_of_its_own(train, tmp_path, monkeypatch):
    """It would look for one where there is none. The model itself is not sharded here."""
    prepare = Reliable._prepare_for_training

    def prepared(trainer, *args):
        trainer.is_fsdp_enabled = True
        trainer.accelerator.state.fsdp_plugin = SimpleNamespace(fsdp_version=2)
        try:
            return prepare(trainer, *args)
        finally:
            trainer.is_fsdp_enabled = False
            del trainer.accelerator.state.fsdp_plugin

    whole, again = tmp_path / "whole", tmp_path / "again"
    assert train(whole, *STEPS)[0] == 0
    cut(whole, again, 3)
    monkeypatch.setattr(Reliable, "_prepare_for_training", prepared)
    code, err = train(again, *STEPS, "--resume")
    assert code == 0, err
    assert digest(again) == digest(whole)


# --- the order of the examples


def test_every_example_once_an_epoch_whatever_the_split():
    whole = Order(10, batch_size=4, steps=5, seed=1)
    seen = [i for n in range(5) for i in whole.batch(n)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    for accum, world in ((2, 1), (1, 2), (2, 2)):
        size = 4 // (accum * world)
        for step in range(5):
            parts = [
                Order(
                    10,
                    batch_size=size,
                    grad_accum=accum,
                    rank=rank,
                    world=world,
                    steps=5,
                    seed=1,
                ).batch(step * accum + number)
                for number in range(accum)
                for rank in range(world)
            ]
            assert [i for part in parts for i in part] == whole.batch(step)


def test_all_the_token_ids_of_an_example_are_its_length():
    import datasets

    rows = [
        {"prompt_ids": [1] * i, "chosen_ids": [2, 2], "rejected_ids": [3], "token_type_ids": [0]}
        for i in range(4)
    ]
    assert token_lengths(datasets.Dataset.from_list(rows)) == [3, 4, 5, 6]
    for nothing in (datasets.Dataset.from_list([{"text": "a"}]), [1, 2]):
        with pytest.raises(UserError, match="--group-by-length needs token ids"):
            token_lengths(nothing)


def test_a_stream_cannot_be_grouped(train, tmp_path):
    code, err = train(tmp_path / "run", *STEPS, "--streaming", "--group-by-length")
    assert (code, "a stream has none" in err) == (2, True), err


def test_ranks_share_a_stream_as_one_would_read_it():
    import datasets

    rows = datasets.Dataset.from_list([{"i": i} for i in range(10)]).to_iterable_dataset()
    rows = rows.shuffle(seed=3, buffer_size=4)
    alone = [row["i"] for row, _ in zip(Stream(rows, 4), range(24), strict=False)]
    ranks = [Stream(rows, 2, rank, world=2) for rank in range(2)]
    parts = [[row["i"] for row, _ in zip(rank, range(12), strict=False)] for rank in ranks]
    for start in range(0, 12, 2):
        both = parts[0][start : start + 2] + parts[1][start : start + 2]
        assert both == alone[2 * start : 2 * start + 4]
    assert sorted(alone[:10]) == sorted(alone[10:20]) == list(range(10))
    assert alone[:10] != alone[10:20]


@pytest.mark.parametrize("size", [64, 61])
def test_grouping_puts_alike_lengths_into_a_step(size):
    lengths = [(i * 37) % 101 for i in range(size)]
    order = Order(size, batch_size=4, steps=2 * size // 4, seed=0, lengths=lengths)
    seen = [i for n in range(len(order)) for i in order.batch(n)]
    assert sorted(seen[:size]) == list(range(size))
    assert sorted(seen[size : 2 * size]) == sorted(set(seen[size : 2 * size]))
    spread = [max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in order]
    mixed = Order(size, batch_size=4, steps=2 * size // 4, seed=0)
    plain = [max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in mixed]
    assert sum(spread) < sum(plain) / 4

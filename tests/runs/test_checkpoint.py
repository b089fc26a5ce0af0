"""Checkpoints: whole or not at all, verified, rotated, refused when they are of another run."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from llmctl.errors import ModelError, ResourceError, UserError
from llmctl.runs import checkpoint, resume
from llmctl.runs.checkpoint import Owner
from tests.made_runs import checkpoint_content

IDENTITY = {"lr": 0.1, "world_size": 1, "seed": 0, "architecture": {"heads": 2, "width": 8}}
OWNER = Owner("run", IDENTITY)


def content(step):
    return checkpoint_content(step, (4, 3))


@pytest.fixture
def root(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, content(step), OWNER)
    return tmp_path


def test_what_is_saved_is_loaded(root):
    loaded = resume.load(root / "checkpoint-2")
    assert loaded.step == 2
    assert loaded.state == {"progressed": {"step": 2}}
    for part in ("model", "optimizer", "rng"):
        for name, tensor in getattr(content(2), part).items():
            assert torch.equal(getattr(loaded, part)[name], tensor)


def test_files_follow_the_umask(root):
    modes = {p.stat().st_mode & 0o777 for p in (root / "checkpoint-1").iterdir()}
    assert modes == {0o644}


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "rng-0.safetensors", "state.json"]
)
@pytest.mark.parametrize("damage", ["delete", "empty", "halve", "flip"])
def test_a_damaged_newest_is_passed_over_by_name(root, name, damage, caplog):
    path = root / "checkpoint-3" / name
    raw = bytearray(path.read_bytes())
    if damage == "delete":
        path.unlink()
    elif damage == "flip":
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)
    else:
        path.write_bytes(raw[: len(raw) // 2 if damage == "halve" else 0])
    assert resume.newest_valid(root, "run")[0] == root / "checkpoint-2"
    assert name in resume.defect(root / "checkpoint-3")
    with pytest.raises(ModelError, match=name):
        resume.load_weights(root / "checkpoint-3")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"files": {}}'])
def test_a_damaged_manifest_is_passed_over(root, text):
    (root / "checkpoint-3" / "manifest.json").write_text(text)
    assert resume.newest_valid(root, "run")[0] == root / "checkpoint-2"


def test_a_manifest_that_lists_too_little_is_no_excuse(root):
    path = root / "checkpoint-3" / "manifest.json"
    manifest = json.loads(path.read_bytes())
    del manifest["files"]["optimizer.safetensors"]
    path.write_text(json.dumps(manifest))
    assert resume.newest_valid(root, "run")[0] == root / "checkpoint-2"


def test_none_valid_is_an_error_and_deletes_nothing(root):
    for path in root.iterdir():
        (path / "manifest.json").unlink()
    with pytest.raises(ModelError, match="no valid checkpoint"):
        resume.newest_valid(root, "run")
    assert len(list(root.iterdir())) == 3


def test_nothing_there_is_no_error(tmp_path):
    assert resume.newest_valid(tmp_path, "run")[0] is None
    assert resume.newest_valid(tmp_path / "absent", "run")[0] is None


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [
        (2, (3, 4), {3, 4}),
        (1, (1, 4), {1, 3, 4}),
        (1, (2, 1), {1, 2, 3, 4}),
        (3, (3, 4), {2, 3, 4}),
    ],
)
def test_rotation_keeps_at_least_two_and_the_best_of_each(root, keep, best, left):
    for step, its_best in zip((3, 4), best, strict=True):
        checkpoint.save(root, replace(content(step), best=its_best), OWNER)
    checkpoint.rotate(root, keep, step=4, run_id="run")
    assert {int(p.name.split("-")[1]) for p in root.iterdir()} == left


def test_rotation_drops_what_lies_ahead_but_not_another_runs(root):
    checkpoint.save(root, content(9), Owner("another", IDENTITY))
    checkpoint.rotate(root, 2, step=2, run_id="run")
    assert {int(p.name.split("-")[1]) for p in root.iterdir()} == {1, 2, 9}


def test_a_damaged_checkpoint_counts_for_nothing(root):
    (root / "checkpoint-3" / "state.json").unlink()
    found, damaged = resume.newest_valid(root, "run")
    assert (found, damaged) == (root / "checkpoint-2", {3})
    checkpoint.save(root, content(4), OWNER)
    checkpoint.rotate(root, 2, step=4, run_id="run", damaged=damaged)
    assert {int(p.name.split("-")[1]) for p in root.iterdir()} == {2, 4}


def test_another_runs_checkpoint_is_passed_over(root, caplog):
    checkpoint.save(root, content(9), Owner("another", IDENTITY))
    assert resume.newest_valid(root, "run")[0] == root / "checkpoint-3"
    assert "checkpoint-9: it is of another run" in caplog.text


def test_a_renamed_checkpoint_is_passed_over(root):
    (root / "checkpoint-3").rename(root / "checkpoint-30")
    assert resume.newest_valid(root, "run")[0] == root / "checkpoint-2"


def test_one_whose_best_checkpoint_is_lost_is_passed_over(root, caplog):
    checkpoint.save(root, replace(content(4), best=3), OWNER)
    assert resume.newest_valid(root, "run")[0] == root / "checkpoint-4"
    (root / "checkpoint-3" / "model.safetensors").unlink()
    assert resume.newest_valid(root, "run")[0] == root / "checkpoint-2"
    assert "the best checkpoint, checkpoint-3: model.safetensors is missing" in caplog.text


def test_a_different_run_is_refused_with_the_difference(root):
    path, other = root / "checkpoint-3", Owner("run", {**IDENTITY, "lr": 0.2, "seed": 1})
    with pytest.raises(ModelError, match=r"lr: 0\.1 -> 0\.2, seed: 0 -> 1"):
        resume.require_same(path, other)
    with pytest.raises(ModelError, match=r"\(seed: 0 -> 1\)"):
        resume.require_same(path, other, ["lr"])
    changed = resume.require_same(path, other, ["lr", "seed"])
    assert changed == {"lr": [0.1, 0.2], "seed": [0, 1]}


@pytest.mark.parametrize("name", ["world_size", "architecture", "lrr"])
def test_some_things_cannot_be_allowed(root, name):
    with pytest.raises(UserError, match=rf"--resume-allow {name}: .*\nallowed: lr, seed"):
        resume.require_same(root / "checkpoint-3", OWNER, [name])


def test_of_an_architecture_only_the_difference_is_shown(root):
    other = Owner("run", {**IDENTITY, "architecture": {"heads": 4, "width": 8}})
    with pytest.raises(ModelError, match=r"\(heads: 2 -> 4\)"):
        resume.require_same(root / "checkpoint-3", other)


def test_leftovers_of_a_killed_save_are_removed(root):
    (root / ".tmp-checkpoint-4").mkdir()
    (root / ".trash-checkpoint-0").mkdir()
    checkpoint.clean(root)
    assert {p.name for p in root.iterdir()} == {f"checkpoint-{n}" for n in (1, 2, 3)}


def test_a_full_disk_is_said_as_such_and_leaves_nothing(root, monkeypatch):
    usage = shutil.disk_usage(root)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ResourceError, match=r"no space left on the disk: .* needed, 10 bytes free"):
        checkpoint.save(root, content(4), OWNER)
    assert {p.name for p in root.iterdir()} == {f"checkpoint-{n}" for n in (1, 2, 3)}


def test_a_failed_write_leaves_nothing_behind(root, monkeypatch):
    def fail(path, value):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write_json", fail)
    with pytest.raises(ResourceError, match="no space left"):
        checkpoint.save(root, content(4), OWNER)
    assert not list(root.glob(".tmp*"))

"""Checkpoints: whole or not at all, verified, rotated, refused when they are of another run."""

import json
import shutil

import pytest
import torch

from llmctl import checkpoint
from llmctl.checkpoint import Content
from llmctl.errors import ModelError, ResourceError

IDENTITY = {"lr": 0.1, "world_size": 1, "seed": 0}


def content(step):
    torch.manual_seed(step)
    return Content(
        step=step,
        model={"weight": torch.randn(4, 3)},
        optimizer={"state.weight.exp_avg": torch.randn(4, 3)},
        rng={"cpu": torch.get_rng_state()},
        state={"progressed": {"step": step}},
    )


@pytest.fixture
def root(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, content(step), IDENTITY)
    return tmp_path


def test_what_is_saved_is_loaded(root):
    loaded = checkpoint.load(root / "checkpoint-2", IDENTITY)
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
    assert checkpoint.newest(root) == root / "checkpoint-2"
    assert name in checkpoint.defect(root / "checkpoint-3")
    with pytest.raises(ModelError, match=name):
        checkpoint.load(root / "checkpoint-3", IDENTITY)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"files": {}}'])
def test_a_damaged_manifest_is_passed_over(root, text):
    (root / "checkpoint-3" / "manifest.json").write_text(text)
    assert checkpoint.newest(root) == root / "checkpoint-2"


def test_a_manifest_that_lists_too_little_is_no_excuse(root):
    path = root / "checkpoint-3" / "manifest.json"
    manifest = json.loads(path.read_bytes())
    del manifest["files"]["optimizer.safetensors"]
    path.write_text(json.dumps(manifest))
    assert checkpoint.newest(root) == root / "checkpoint-2"


def test_none_valid_is_an_error_and_deletes_nothing(root):
    for path in root.iterdir():
        (path / "manifest.json").unlink()
    with pytest.raises(ModelError, match="no valid checkpoint"):
        checkpoint.newest(root)
    assert len(list(root.iterdir())) == 3


def test_nothing_there_is_no_error(tmp_path):
    assert checkpoint.newest(tmp_path) is None
    assert checkpoint.newest(tmp_path / "absent") is None


@pytest.mark.parametrize(
    ("keep", "best", "left"), [(2, None, {2, 3}), (1, 1, {1, 2, 3}), (5, 1, {1, 2, 3})]
)
def test_rotation_keeps_at_least_two_and_the_best(root, keep, best, left):
    checkpoint.rotate(root, keep, best)
    assert {int(p.name.split("-")[1]) for p in root.iterdir()} == left


def test_a_different_run_is_refused_with_the_difference(root):
    with pytest.raises(ModelError, match=r"lr: 0\.1 -> 0\.2"):
        checkpoint.load(root / "checkpoint-3", {**IDENTITY, "lr": 0.2})


def test_leftovers_of_a_killed_save_are_removed(root):
    (root / ".tmp-checkpoint-4").mkdir()
    (root / ".trash-checkpoint-0").mkdir()
    checkpoint.clean(root)
    assert {p.name for p in root.iterdir()} == {f"checkpoint-{n}" for n in (1, 2, 3)}


def test_a_full_disk_is_said_as_such_and_leaves_nothing(root, monkeypatch):
    usage = shutil.disk_usage(root)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ResourceError, match=r"no space left on the disk: .* needed, 10 bytes free"):
        checkpoint.save(root, content(4), IDENTITY)
    assert {p.name for p in root.iterdir()} == {f"checkpoint-{n}" for n in (1, 2, 3)}


def test_a_failed_write_leaves_nothing_behind(root, monkeypatch):
    def fail(path, value):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write_json", fail)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(root, content(4), IDENTITY)
    assert not list(root.glob(".tmp*"))

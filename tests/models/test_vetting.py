"""Folders that hold something else than a model: said as what they are."""

import json
import shutil

import pytest
import torch

from llmctl.data.tokenizer.load import load_vocabulary
from llmctl.errors import ModelError
from llmctl.models.loading import load_causal_lm, load_tokenizer

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0f" * 32 + "\nsize 4400\n"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_pointer_of_git_lfs_is_called_one(base, tmp_path, name):
    folder = tmp_path / "model"
    shutil.copytree(base / "model", folder)
    (folder / name).write_text(POINTER)
    ways = [lambda: load_causal_lm(str(folder), dtype=torch.float32)]
    ways += [lambda: load_tokenizer(str(folder))]
    ways += [lambda: load_vocabulary(str(folder))] if name == "tokenizer.json" else []
    for load in ways:
        with pytest.raises(ModelError, match="a pointer of git-lfs") as caught:
            load()
        assert caught.value.file == str(folder / name)
        assert "git lfs pull" in caught.value.hint


@pytest.fixture
def parts(tmp_path):
    """A tokenizer as `ByteLevelBPETokenizer.save_model` leaves it."""
    folder = tmp_path / "parts"
    folder.mkdir()
    vocabulary = {c: i for i, c in enumerate(["<|endoftext|>", "a", "b", "Ġ", "ab", "Ġab"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\na b\nĠ ab\n")
    return folder


@pytest.mark.parametrize("load", [load_tokenizer, load_vocabulary])
def test_a_tokenizer_in_parts_is_said_to_be_one(parts, load):
    with pytest.raises(ModelError, match=r"vocab\.json and merges\.txt without a tokenizer\.json"):
        load(str(parts))


def test_a_tokenizer_in_parts_of_a_known_kind_is_opened(parts):
    (parts / "config.json").write_text('{"model_type": "gpt2"}')
    vocabulary, _ = load_vocabulary(str(parts))
    assert vocabulary.tokenizer.encode("ab aba").ids == [4, 5, 1]
    assert load_tokenizer(str(parts))("ab aba").input_ids == [4, 5, 1]

"""Merging: the merged model says what its adapter says, or nothing is written."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmctl.errors import ModelError
from llmctl.models.adapters import weights_sha256
from llmctl.models.merging import find_mergeable, merge, merge_model, save_merged
from tests.models.test_adapters import (
    NEW,
    TOKENS,
    WAYS,
    load,
    logits,
    make_adapter,
    make_base,
    make_tokenizer,
    train,
)

torch.set_num_threads(1)


@pytest.fixture
def pair(tmp_path):
    """A base and an adapter with new tokens on it, as a run has them."""
    base = make_base(tmp_path / "base")
    make_adapter(base, tmp_path / "sft" / "adapter", added=NEW, **WAYS["lora"])
    return base, tmp_path / "sft"


@pytest.mark.parametrize("added", [(), NEW])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("way", ["lora", "rslora", "dora"])
def test_a_merged_folder_says_what_the_adapter_says(tmp_path, way, kind, tied, added):
    base = make_base(tmp_path / "base", kind, tied)
    expected = logits(make_adapter(base, tmp_path / "adapter", added=added, **WAYS[way]))
    merged = merge(find_mergeable(str(tmp_path / "adapter")))
    assert merged.difference < 1e-5
    assert merged.quantized_difference is None
    save_merged(merged, tmp_path / "model")
    model, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", output_loading_info=True
    )
    assert not any(report.values())
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    assert (model.config.vocab_size, model.config.tie_word_embeddings) == (48 + len(added), tied)
    assert not hasattr(model.config, "quantization_config")
    assert model.generation_config.eos_token_id == ([1, 48, 49] if added else 1)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "model")) == 48 + len(added)
    names = set(load_file(tmp_path / "model" / "model.safetensors"))
    assert names >= set(load_file(base / "model.safetensors"))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("load_in", ["4bit", "8bit"])
def test_an_adapter_of_a_quantized_base_merges_into_what_it_was_trained_on(tmp_path, kind, load_in):
    base = make_base(tmp_path / "base", kind)
    adapter = tmp_path / "adapter"
    expected = logits(make_adapter(base, adapter, load_in=load_in, **WAYS["lora"]))
    merged = merge(find_mergeable(str(adapter)))
    save_merged(merged, tmp_path / "model")
    off = (logits(load(tmp_path / "model")) - expected).abs().max()
    on_original = (logits(load(adapter)) - expected).abs().max()
    assert merged.difference < 1e-5
    if load_in == "4bit":
        assert off < 1e-4 < on_original
        assert merged.quantized_difference < 1e-4
    else:
        assert 0 < merged.quantized_difference < 0.1
    assert merged.as_result()["dequantized"] == load_in


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, of what it does all the same
def test_a_merge_that_changes_the_model_is_refused(tmp_path):
    """PEFT adapts tied embeddings if told to, and merges them into the output layer too."""
    from peft import LoraConfig, get_peft_model

    about = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["embed_tokens", "q_proj"])
    model = train(get_peft_model(load(make_base(tmp_path / "base")), about))
    with pytest.raises(ModelError, match="the merged model's logits differ"):
        merge_model(model)


def test_adapters_made_elsewhere_merge(tmp_path):
    """As PEFT itself saves them: no hash of the base, no tokenizer."""
    from peft import LoraConfig, get_peft_model

    base = make_base(tmp_path / "base")
    about = LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights="pissa"
    )
    model = train(get_peft_model(load(base), about))
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model)
    assert torch.equal(logits(load(tmp_path / "adapter")), expected)
    merged = merge(find_mergeable(str(tmp_path / "adapter")))
    torch.testing.assert_close(logits(merged.model), expected, rtol=0, atol=1e-5)
    assert len(merged.tokenizer) == 48


def test_embeddings_saved_whole_elsewhere_merge(tmp_path):
    from peft import LoraConfig, get_peft_model

    from llmctl.models.loading import grow_embeddings

    base = make_base(tmp_path / "base")
    model = load(base)
    grow_embeddings(model, make_tokenizer(NEW))
    about = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    model = train(get_peft_model(model, about))
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    merged = merge(find_mergeable(str(tmp_path / "adapter")))
    torch.testing.assert_close(logits(merged.model), logits(model), rtol=0, atol=1e-5)


# The command


def test_merge_from_the_command_line(cli, pair, tmp_path):
    base, sft = pair
    out = tmp_path / "merged"
    result = cli("merge", "--model", sft, "-o", out, "--threads", 1)
    assert result.code == 0, result.err
    assert result.out == f"{out}\n"
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["result"]["difference"] < 1e-5
    roles = {entry["role"]: entry for entry in manifest["inputs"]}
    assert roles["base"]["sha256"] == weights_sha256(base)
    assert len(roles["adapter"]["sha256"]) == 64
    torch.testing.assert_close(logits(load(out)), logits(load(sft / "adapter")), rtol=0, atol=1e-5)
    assert TOKENS.shape == (2, 8)


def test_json_and_a_base_that_moved(cli, pair, tmp_path):
    base, sft = pair
    base.rename(tmp_path / "moved")
    gone = cli("merge", "--model", sft, "-o", tmp_path / "out")
    assert gone.code == 4
    assert "--base" in gone.err
    result = cli(
        *("merge", "--model", sft, "--base", tmp_path / "moved", "-o", tmp_path / "out"), "--json"
    )
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert found["status"] == "completed"
    assert found["model"] == str(tmp_path / "out" / "model")
    assert found["difference"] < 1e-5


def test_dry_run_writes_nothing(cli, pair, tmp_path):
    result = cli("merge", "--model", pair[1], "-o", tmp_path / "out", "--dry-run")
    assert result.code == 0, result.err
    assert "stage: merge" in result.out
    assert "would merge" in result.err
    assert not (tmp_path / "out").exists()


def no_adapter(base, sft):
    shutil.rmtree(sft / "adapter")
    shutil.copytree(base, sft / "adapter")


def pickled(base, sft):
    (sft / "adapter" / "adapter_model.safetensors").rename(sft / "adapter" / "adapter_model.bin")


def other_base(base, sft):
    make_base(base, seed=5)


def other_shape(base, sft):
    make_base(base, hidden=32)
    file = sft / "adapter" / "adapter_model.safetensors"
    save_file(load_file(file), file)  # without the hash, as made elsewhere


def gone(base, sft):
    shutil.rmtree(base)


def nested(base, sft):
    shutil.copytree(sft / "adapter", base, dirs_exist_ok=True)


def prompt(base, sft):
    make_adapter(base, sft / "adapter", prompt_tuning=2, steps=1)


BAD = {
    no_adapter: "no adapter here",
    pickled: "only pickled weights",
    other_base: "trained on another base",
    other_shape: "the base takes",
    gone: "is gone",
    nested: "is an adapter itself",
    prompt: "virtual tokens cannot be merged",
}


@pytest.mark.parametrize("spoil", BAD, ids=lambda spoil: spoil.__name__)
def test_bad_input(cli, pair, tmp_path, spoil):
    spoil(*pair)
    result = cli("merge", "--model", pair[1], "-o", tmp_path / "out")
    assert result.code == 4, result.err
    assert BAD[spoil] in result.err
    assert "Traceback" not in result.err
    assert not (tmp_path / "out").exists()

"""Encoders are told from causal language models, and refused by every command that needs one."""

import shutil

import pytest
from transformers import (
    BartConfig,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    Gemma4TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    RobertaConfig,
    T5Config,
    ViTConfig,
)

from llmctl.errors import ModelError
from llmctl.models.causality import is_encoder, require_causal_config


@pytest.mark.parametrize("make", [BertConfig, RobertaConfig])
def test_encoders_are_refused_unless_they_are_set_up_as_decoders(make):
    assert is_encoder(make())
    with pytest.raises(ModelError, match="reads a text from both sides") as error:
        require_causal_config(make(), "here")
    assert "llmctl sft --task classify" in error.value.hint
    assert "llmctl reward" in error.value.hint
    assert not is_encoder(make(is_decoder=True))
    require_causal_config(make(is_decoder=True), "here")


@pytest.mark.parametrize("make", [T5Config, BartConfig])
def test_encoder_decoders_are_refused(make):
    with pytest.raises(ModelError, match="is an encoder-decoder") as error:
        require_causal_config(make(), "here")
    assert "use a decoder" in error.value.hint


@pytest.mark.parametrize("make", [LlamaConfig, GPT2Config, MambaConfig, GPTNeoXConfig, GemmaConfig])
def test_causal_models_are_accepted(make):
    assert not is_encoder(make())
    require_causal_config(make(), "here")


@pytest.mark.parametrize(
    "config",
    [
        GemmaConfig(use_bidirectional_attention=True),
        Gemma4TextConfig(use_bidirectional_attention="all"),
    ],
)
def test_a_decoder_that_attends_both_ways_is_refused(config):
    assert is_encoder(config)
    with pytest.raises(ModelError, match="is not a causal language model"):
        require_causal_config(config, "here")


def test_architectures_without_a_language_model_are_refused():
    with pytest.raises(ModelError, match="no causal language model of the architecture vit"):
        require_causal_config(ViTConfig(), "here")


@pytest.fixture(scope="module")
def bert(base, tmp_path_factory):
    """A tiny BERT with its masked language model's head and a tokenizer beside it."""
    folder = tmp_path_factory.mktemp("bert")
    shutil.copytree(base / "model", folder, dirs_exist_ok=True)
    (folder / "generation_config.json").unlink()
    size = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=320, intermediate_size=16, **size)
    BertForMaskedLM(config).save_pretrained(folder)
    return folder


COMMANDS = {
    "generate": ("generate", "--prompt", "The", "--model", "BERT"),
    "quantize": ("quantize", "--bits", 4, "--model", "BERT", "-o", "OUT"),
    "ppo": (
        *("ppo", "--data", "builtin:tasks", "--reward-rule", "exact", "--max-steps", 1),
        *("--model", "BERT", "-o", "OUT"),
    ),
    "pretrain": ("pretrain", "--tokens", "TOKENS", "--model", "BERT", "-o", "OUT"),
    "pretrain from scratch": (
        *("pretrain", "--tokens", "TOKENS", "--config-from", "BERT", "-o", "OUT"),
    ),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_refuse_an_encoder_and_say_what_it_is_good_for(cli, name, bert, tokens, tmp_path):
    out = tmp_path / "run"
    values = {"BERT": bert, "TOKENS": tokens, "OUT": out}
    result = cli(*(values.get(word, word) for word in COMMANDS[name]))
    assert result.code == 4, result.err
    assert "bert is not a causal language model" in result.err
    assert "llmctl sft --task classify" in result.err
    assert "llmctl reward" in result.err
    assert not out.exists()


def test_the_body_of_an_encoder_is_refused_alike(cli, bert, tmp_path):
    shutil.copytree(bert, tmp_path, dirs_exist_ok=True)
    BertModel(BertConfig.from_pretrained(bert)).save_pretrained(tmp_path)
    result = cli("generate", "--prompt", "The", "--model", tmp_path)
    assert result.code == 4, result.err
    assert "llmctl reward" in result.err

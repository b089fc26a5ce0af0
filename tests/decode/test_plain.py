"""Plain decoders opened without transformers' code of models: the same logits, or the other way."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from llmctl.config.commands.generate import GenerateConfig
from llmctl.decode.forward import HuggingFaceForward
from llmctl.decode.llama import TOLERANCE, LlamaForward, PlainModel
from llmctl.decode.loop import config_for_generation, load_for_generation
from llmctl.decode.plain import load_plain
from llmctl.models.plain import PlainConfig, read_plain_config

SIZES = {
    **{"vocab_size": 211, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3},
    **{"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 128},
    **{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "initializer_range": 0.4},
}
TIED = {"tie_word_embeddings": True}
KINDS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama-tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, **TIED)),
    "llama-theta": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, rope_theta=5e5)),
    "llama-head-size": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, head_dim=12)),
    "llama-no-groups": lambda: LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_key_value_heads": 6})),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen2-tied": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, **TIED)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16)),
    "qwen3-tied": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16, **TIED)),
}
PROMPTS = [[3, 4, 5, 6, 7], [8, 9], [10, 11, 12]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each kind, whose norms and biases are not those that change nothing."""
    torch.manual_seed(5)
    made = {}
    for name, build in KINDS.items():
        model: PreTrainedModel = build()
        for tensor, parameter in model.named_parameters():
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, 0.0 if "bias" in tensor else 1.0, 0.3)
        made[name] = tmp_path_factory.mktemp("plain") / name
        model.save_pretrained(made[name])
    return made


def opened(folder: Path, dtype: str = "fp32") -> tuple[PreTrainedModel, PlainModel]:
    """A model by transformers and as a plain one."""
    config = GenerateConfig(model=str(folder), prompt=["x"], device="cpu", dtype=dtype)
    shape = config_for_generation(config)
    assert isinstance(shape, PlainConfig)
    plain = load_for_generation(config.model, config, shape, device="cpu", rows=1)
    assert isinstance(plain, PlainModel)
    wanted = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    return AutoModelForCausalLM.from_pretrained(folder, dtype=wanted).eval(), plain


@torch.inference_mode()
def logits_of(forward: HuggingFaceForward | LlamaForward) -> torch.Tensor:
    """Logits after prompts of several lengths, after steps, and after rows have left."""
    logits = [forward.prefill(PROMPTS)]
    logits += [forward.step(torch.tensor([20, 21, 22])) for _ in range(3)]
    forward.select([0, 2])
    logits += [forward.step(torch.tensor([30, 31])) for _ in range(70)]
    return torch.cat(logits)


@pytest.mark.parametrize("name", KINDS)
def test_logits_are_those_of_transformers(folders: dict[str, Path], name: str) -> None:
    theirs, ours = opened(folders[name])
    torch.testing.assert_close(
        logits_of(LlamaForward(ours.weights)),
        logits_of(HuggingFaceForward(theirs)),
        rtol=1e-4,
        atol=1e-4,
    )
    assert ours.num_parameters() == theirs.num_parameters()
    assert ours.generation_config.eos_token_id == theirs.generation_config.eos_token_id == 1


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_low_precision_is_as_near_as_the_fast_pass_must_be(
    folders: dict[str, Path], dtype: str
) -> None:
    theirs, ours = opened(folders["qwen3"], dtype)
    assert ours.weights.embedding.dtype is theirs.dtype
    expected = logits_of(HuggingFaceForward(theirs)).float()
    error = (logits_of(LlamaForward(ours.weights)).float() - expected).abs().max()
    assert error <= TOLERANCE[theirs.dtype] * expected.abs().max()


def test_a_table_that_is_tied_is_held_once(folders: dict[str, Path]) -> None:
    _, ours = opened(folders["llama-tied"])
    assert ours.weights.unembedding.data_ptr() == ours.weights.embedding.data_ptr()


CONFIGS = {
    "a key that is not known": {"logit_scale": 2.0},
    "scaled positions": {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2}
    },
    "scaled positions, in old words": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "two bases": {"rope_theta": 1.0},
    "another activation": {"hidden_act": "gelu"},
    "biases of attention": {"attention_bias": True},
    "biases of the MLP": {"mlp_bias": True},
    "a window": {"sliding_window": 8},
    "a window and a switch that llama has not": {"sliding_window": 8, "use_sliding_window": False},
    "quantized": {"quantization_config": {"quant_method": "bitsandbytes"}},
    "no heads' number": {"num_key_value_heads": None},
    "layers in words": {"num_hidden_layers": "3"},
    "an odd head": {"head_dim": 7},
    "another architecture": {"model_type": "gemma"},
    "an end in words": {"eos_token_id": "</s>"},
}


@pytest.mark.parametrize("change", CONFIGS.values(), ids=CONFIGS)
def test_what_is_not_listed_is_not_plain(
    folders: dict[str, Path], tmp_path: Path, change: dict[str, object]
) -> None:
    folder = shutil.copytree(folders["llama"], tmp_path / "model")
    (folder / "generation_config.json").unlink()
    assert read_plain_config(folder) is not None
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    assert read_plain_config(folder) is None


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("mistral", "sliding_window"),
        ("qwen3", "head_dim"),
        ("llama", "tie_word_embeddings"),
        ("llama", "rms_norm_eps"),
        ("llama", "rope_parameters"),
        ("llama", "num_key_value_heads"),
    ],
)
def test_what_is_not_said_is_not_guessed(
    folders: dict[str, Path], tmp_path: Path, name: str, key: str
) -> None:
    folder = shutil.copytree(folders[name], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config.pop(key)
    (folder / "config.json").write_text(json.dumps(config))
    assert read_plain_config(folder) is None


def broken_tensors(weights: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    """Weights that are not those that config.json describes."""
    name = "model.layers.1.mlp.up_proj.weight"
    match how:
        case "missing":
            weights.pop(name)
        case "too many":
            weights["model.layers.1.mlp.up_proj.bias"] = torch.zeros(80)
        case "misshapen":
            weights[name] = weights[name][:-1].contiguous()
        case "not finite":
            weights[name][0, 0] = torch.nan
        case "whole numbers":
            weights[name] = weights[name].to(torch.int8)
    return weights


@pytest.mark.parametrize(
    "how", ["missing", "too many", "misshapen", "not finite", "whole numbers", "cut off"]
)
def test_broken_weights_are_refused_in_the_same_words(
    cli, base: Path, tmp_path: Path, how: str
) -> None:
    folder = shutil.copytree(base / "model", tmp_path / "model")
    file = folder / "model.safetensors"
    if how == "cut off":
        file.write_bytes(file.read_bytes()[:-9])
    else:
        save_file(broken_tensors(load_file(file), how), file, {"format": "pt"})
    config = read_plain_config(folder)
    assert config is not None
    assert load_plain(config, dtype=torch.float32, device="cpu") is None
    command = ("generate", "--model", folder, "--prompt", "a", "--max-new-tokens", 2)
    ours, theirs = cli(*command), cli(*command, "--check")
    assert (ours.code, ours.err) == (theirs.code, theirs.err)
    assert ours.code == (0 if how == "whole numbers" else 4)


def test_checked_or_not_the_text_is_the_same(cli, base: Path) -> None:
    command = ("generate", "--model", base, "--prompt", "The cat", "--prompt", "A dog", "--json")
    ours, theirs = cli(*command, "--seed", 4), cli(*command, "--seed", 4, "--check")
    assert ours.code == theirs.code == 0
    assert ours.out == theirs.out

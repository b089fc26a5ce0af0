"""A model's architecture, sizes and rotary positions in the terms of GGUF.

In: a configuration of transformers. Out: keys and values, as llama.cpp reads them. A model that
llama.cpp would compute otherwise than transformers is refused.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llmctl.errors import ModelError

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""Model type of transformers -> architecture of llama.cpp."""

YARN = {"rope_type", "rope_theta", "factor", "original_max_position_embeddings"}
YARN_OPTIONS = {"beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}


@dataclass(frozen=True)
class AttentionHeads:
    """How attention divides the rows of its projections."""

    queries: int
    keys: int
    width: int


def heads_of(config: PreTrainedConfig) -> AttentionHeads:
    """Attention heads, those of keys and values, and the width of one."""
    queries = int(config.num_attention_heads)
    width = config.to_dict().get("head_dim") or config.hidden_size // queries
    return AttentionHeads(queries, int(config.num_key_value_heads), int(width))


def check_architecture(config: PreTrainedConfig) -> None:
    """Refuse a model that llama.cpp does not know, or would compute otherwise.

    Raises:
        ModelError: naming the setting.
    """
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise ModelError(
            f"a GGUF file cannot be written for the architecture {kind}",
            hint=f"those that can: {', '.join(ARCHITECTURES)}",
        )
    settings = config.to_dict()
    if settings.get("quantization_config"):
        raise ModelError(
            "the weights are quantized already",
            hint="write the GGUF file from the model that they were made of",
        )
    if config.hidden_act != "silu":
        raise ModelError(f"hidden_act {config.hidden_act}: llama.cpp computes {kind} with silu")
    if kind == "qwen3" and settings.get("attention_bias"):
        raise ModelError("attention_bias: llama.cpp knows no biases in qwen3's attention")
    _check_rope(config)


def architecture_metadata(config: PreTrainedConfig) -> Iterator[tuple[str, int | float | str]]:
    """Yield key, without the architecture's name before it, and value, in the order of the file."""
    heads = heads_of(config)
    rope = config.rope_parameters
    yield "block_count", config.num_hidden_layers
    yield "context_length", context_length(config)
    yield "embedding_length", config.hidden_size
    yield "feed_forward_length", config.intermediate_size
    yield "attention.head_count", heads.queries
    yield "attention.head_count_kv", heads.keys
    yield "attention.key_length", heads.width
    yield "attention.value_length", heads.width
    yield "attention.layer_norm_rms_epsilon", float(config.rms_norm_eps)
    yield "vocab_size", config.vocab_size
    yield "rope.dimension_count", heads.width
    yield "rope.freq_base", float(rope["rope_theta"])
    kind = rope["rope_type"]
    if kind in ("linear", "yarn"):
        yield "rope.scaling.type", kind
        yield "rope.scaling.factor", float(rope["factor"])
    if kind == "yarn":
        yield "rope.scaling.original_context_length", int(rope["original_max_position_embeddings"])
        for name, key in YARN_OPTIONS.items():
            if rope.get(name) is not None:
                yield f"rope.scaling.{key}", float(rope[name])


def context_length(config: PreTrainedConfig) -> int:
    """Tokens up to which llama.cpp computes the same as transformers.

    It knows no sliding window for these architectures: within the first window there is none.
    """
    settings = config.to_dict()
    window, longest = settings.get("sliding_window"), int(config.max_position_embeddings)
    slides = "sliding_attention" in (settings.get("layer_types") or ["sliding_attention"])
    return min(longest, int(window)) if window and slides else longest


def rope_factors(config: PreTrainedConfig) -> Tensor | None:
    """Divisors of the rotary frequencies (width / 2,), None without Llama 3.1's scaling.

    It stretches long waves and leaves short ones.
    """
    rope = config.rope_parameters
    if rope["rope_type"] != "llama3":
        return None
    scaled: Tensor = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0]
    width = heads_of(config).width
    steps = torch.arange(0, width, 2, dtype=torch.float32)
    plain: Tensor = 1.0 / rope["rope_theta"] ** (steps / width)
    return plain / scaled


def _check_rope(config: PreTrainedConfig) -> None:
    rope: dict[str, Any] = config.rope_parameters
    kind = rope.get("rope_type")
    refused = None
    if kind not in ("default", "linear", "yarn", "llama3"):
        refused = f"rotary positions of type {kind}"
    elif kind == "llama3" and ARCHITECTURES[config.model_type] != "llama":
        refused = f"rotary positions of type llama3 in {config.model_type}"
    elif rope.get("partial_rotary_factor", 1.0) != 1.0:
        refused = f"partial_rotary_factor {rope['partial_rotary_factor']}"
    elif kind == "yarn":
        known = YARN | set(YARN_OPTIONS) | {"partial_rotary_factor"}
        odd = sorted(key for key in rope if key not in known and rope[key] is not None)
        refused = f"yarn's {odd[0]} {rope[odd[0]]}" if odd else None
    if refused:
        raise ModelError(f"a GGUF file cannot say this of the model: {refused}")

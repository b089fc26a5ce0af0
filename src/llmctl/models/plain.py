"""Plain dense decoders, opened without transformers' code of models.

In: a folder. Out: its configuration and its weights by name, or None for all that is not plain: an
adapter, a quantized model, weights in parts, a key or a value in config.json that is not listed
here, a tensor too many, too few or of another shape. That takes the way through transformers, which
says what is wrong with it. The architectures here passed a comparison of logits in the tests.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmctl.models.adapters import is_adapter
from llmctl.models.vetting import check_counts, check_files, read_object

WEIGHTS = "model.safetensors"
SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
)
"""Keys that must be there, positive whole numbers."""
FREE = {
    *("architectures", "model_type", "bos_token_id", "eos_token_id", "pad_token_id"),
    *("unk_token_id", "dtype", "torch_dtype", "initializer_range", "transformers_version"),
    *("use_cache", "_name_or_path", "_model_name_or_path", "attention_dropout", "rms_norm_eps"),
    *("tie_word_embeddings", "rope_theta", "rope_parameters", "head_dim", "max_window_layers"),
    *("sliding_window", "transformers.js_config"),
}
"""Keys that are read here, or that change no logits in use."""
FIXED = {
    **{"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1},
    **{"rope_scaling": None, "use_sliding_window": False},
    **{"rope_interleaved": False, "is_llama_config": True},
}
"""Keys that may have this value alone."""
DTYPES = {
    **{"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16},
}


@dataclass(frozen=True)
class Family:
    """What sets an architecture apart from Llama's."""

    required: frozenset[str] = frozenset()
    """Keys whose absence means another value than elsewhere."""
    has_bias: bool = False
    """Whether queries, keys and values have biases."""
    norms_heads: bool = False
    """Whether queries and keys are normalised."""
    switches_window: bool = False
    """Whether `use_sliding_window` decides whether `sliding_window` counts."""


FAMILIES = {
    "llama": Family(),
    "mistral": Family(required=frozenset({"sliding_window"})),
    "qwen2": Family(has_bias=True, switches_window=True),
    "qwen3": Family(required=frozenset({"head_dim"}), norms_heads=True, switches_window=True),
}


@dataclass(frozen=True)
class PlainConfig:
    """Configuration of a plain dense decoder, in the names of transformers."""

    folder: Path
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    dtype: torch.dtype | None
    eos_token_id: int | list[int] | None
    """Of generation_config.json, where there is one."""

    def get_text_config(self) -> "PlainConfig":
        """Itself: it has no other part."""
        return self

    @property
    def family(self) -> Family:
        """What sets its architecture apart."""
        return FAMILIES[self.model_type]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that the weights have, by name."""
        hidden, inner = self.hidden_size, self.intermediate_size
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, hidden),
            "model.norm.weight": (hidden,),
        }
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        queries = self.num_attention_heads * self.head_dim
        keys = self.num_key_value_heads * self.head_dim
        block: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj.weight": (queries, hidden),
            "self_attn.k_proj.weight": (keys, hidden),
            "self_attn.v_proj.weight": (keys, hidden),
            "self_attn.o_proj.weight": (hidden, queries),
            "mlp.gate_proj.weight": (inner, hidden),
            "mlp.up_proj.weight": (inner, hidden),
            "mlp.down_proj.weight": (hidden, inner),
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
        }
        if self.family.has_bias:
            block |= {
                f"self_attn.{n}_proj.bias": (s,)
                for n, s in zip("qkv", (queries, keys, keys), strict=True)
            }
        if self.family.norms_heads:
            block |= {f"self_attn.{name}_norm.weight": (self.head_dim,) for name in "qk"}
        for layer in range(self.num_hidden_layers):
            shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
        return shapes


def read_plain_config(folder: Path) -> PlainConfig | None:
    """Read the configuration of a folder, if it is of a plain dense decoder.

    Raises:
        ModelError: files that no way of loading takes, as `loading.load_config` refuses them.
    """
    if is_adapter(folder) or not (folder / "config.json").is_file():
        return None
    if [path.name for path in folder.glob("*.safetensors")] != [WEIGHTS]:
        return None
    check_files(folder)
    raw = read_object(folder / "config.json")
    check_counts(raw, folder)
    family, theta = FAMILIES.get(str(raw.get("model_type"))), _theta(raw)
    if family is None or theta is None or not _is_listed(raw, family):
        return None
    try:
        eos = _end_tokens(folder, raw)
    except ValueError:
        return None
    named = raw.get("dtype", raw.get("torch_dtype"))
    return PlainConfig(
        folder=folder,
        model_type=raw["model_type"],
        **{name: raw[name] for name in SIZES},
        head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
        rms_norm_eps=raw["rms_norm_eps"],
        rope_theta=theta,
        tie_word_embeddings=raw["tie_word_embeddings"],
        dtype=DTYPES.get(named) if isinstance(named, str) else None,
        eos_token_id=eos,
    )


def _is_listed(raw: dict[str, Any], family: Family) -> bool:
    """Whether all keys and values of a config.json are known, and those needed are there."""
    known = {*SIZES, *FREE, *FIXED, "layer_types"}
    if not raw.keys() <= known or not family.required <= raw.keys():
        return False
    if not all(type(raw.get(name)) is int and raw[name] > 0 for name in SIZES):
        return False
    if any(name in raw and raw[name] != value for name, value in FIXED.items()):
        return False
    head_dim, heads = raw.get("head_dim"), raw["num_attention_heads"]
    is_off = "use_sliding_window" in raw  # and false, as FIXED has it
    return (
        set(raw.get("layer_types") or ()) <= {"full_attention"}
        and type(raw.get("tie_word_embeddings")) is bool
        and isinstance(raw.get("rms_norm_eps"), float)
        and (head_dim is None or (type(head_dim) is int and head_dim > 0))
        and (head_dim is not None or raw["hidden_size"] % heads == 0)
        and (head_dim or raw["hidden_size"] // heads) % 2 == 0
        and heads % raw["num_key_value_heads"] == 0
        and (raw.get("sliding_window") is None or family.switches_window & is_off)
    )


def _theta(raw: dict[str, Any]) -> float | None:
    """Base of the rotary angles; None where anything else is said of them, or nothing."""
    rotary = raw.get("rope_parameters")
    if rotary is None:
        theta = raw.get("rope_theta")
    elif isinstance(rotary, dict) and rotary.keys() == {"rope_type", "rope_theta"}:
        theta = rotary["rope_theta"] if rotary["rope_type"] == "default" else None
        theta = theta if raw.get("rope_theta", theta) == theta else None
    else:
        theta = None
    is_number = isinstance(theta, int | float) and not isinstance(theta, bool) and theta > 0
    return float(theta) if is_number and theta is not None else None


def _end_tokens(folder: Path, raw: dict[str, Any]) -> int | list[int] | None:
    """Tokens that end a text; raise a ValueError for what are no tokens."""
    file = folder / "generation_config.json"
    found = (read_object(file) if file.exists() else raw).get("eos_token_id")
    tokens = found if isinstance(found, list) else [found]
    if found is not None and not all(type(token) is int for token in tokens):
        raise ValueError(found)
    return found


def read_plain_weights(config: PlainConfig, device: str) -> dict[str, Tensor] | None:
    """The weights by name, as they were saved; None unless they are those that are described."""
    shapes = config.shapes()
    try:
        with safe_open(config.folder / WEIGHTS, "pt", device=device) as file:
            if set(file.keys()) != shapes.keys():
                return None
            slices = {name: file.get_slice(name) for name in shapes}
            kinds = {part.get_dtype() for part in slices.values()}
            if not kinds <= {"F32", "BF16", "F16"}:
                return None
            if any(tuple(slices[name].get_shape()) != shape for name, shape in shapes.items()):
                return None
            return {name: file.get_tensor(name) for name in shapes}
    except (SafetensorError, OSError, json.JSONDecodeError):
        return None


def blocks_of(weights: dict[str, Tensor], layers: int) -> Iterator[dict[str, Tensor]]:
    """Take the weights of each block out, by their names in it."""
    for layer in range(layers):
        start = f"model.layers.{layer}."
        names = [name for name in weights if name.startswith(start)]
        yield {name.removeprefix(start): weights.pop(name) for name in names}

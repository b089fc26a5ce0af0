"""Shapes with published parameter counts, and ours: a name in, a configuration out."""

import difflib
from pathlib import Path

from transformers import GPT2Config, LlamaConfig, PreTrainedConfig

from llmctl.errors import UserError
from llmctl.models import load_config
from llmctl.shapes import PRESETS, llama_config


def _gpt2(layers: int, hidden: int, heads: int) -> PreTrainedConfig:
    """Radford et al., 2019, table 2."""
    return GPT2Config(n_layer=layers, n_embd=hidden, n_head=heads)


def _llama(
    layers: int, hidden: int, heads: int, intermediate: int, *, context: int, kv_heads: int = 0
) -> PreTrainedConfig:
    """Touvron et al., 2023, arXiv:2302.13971, table 2, and arXiv:2307.09288, table 1."""
    return LlamaConfig(
        vocab_size=32_000,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads or heads,
        max_position_embeddings=context,
        tie_word_embeddings=False,
    )


KNOWN = {
    "gpt2-124m": lambda: _gpt2(12, 768, 12),
    "gpt2-355m": lambda: _gpt2(24, 1024, 16),
    "gpt2-774m": lambda: _gpt2(36, 1280, 20),
    "gpt2-1.5b": lambda: _gpt2(48, 1600, 25),
    "llama-7b": lambda: _llama(32, 4096, 32, 11_008, context=2048),
    "llama-2-7b": lambda: _llama(32, 4096, 32, 11_008, context=4096),
    "llama-2-13b": lambda: _llama(40, 5120, 40, 13_824, context=4096),
    "llama-2-70b": lambda: _llama(80, 8192, 64, 28_672, context=4096, kv_heads=8),
}
VOCABULARY = 50_257
"""GPT-2's, taken for a preset, whose vocabulary is that of its tokenizer."""


def config_of(name: str) -> PreTrainedConfig:
    """The configuration of a published shape, a preset of ours, a folder or a Hub id.

    Raises:
        UserError: it is none of them.
    """
    if name.lower() in KNOWN:
        return KNOWN[name.lower()]()
    if name in PRESETS:
        return llama_config(PRESETS[name], VOCABULARY)
    if Path(name).expanduser().exists() or "/" in name:
        return load_config(name)
    names = [*KNOWN, *PRESETS]
    close = difflib.get_close_matches(name.lower(), names, n=1)
    raise UserError(
        f"--shape: unknown shape {name!r}" + (f": did you mean {close[0]}?" if close else ""),
        hint=f"one of {', '.join(names)}, or a run, a folder or a Hub id",
    )

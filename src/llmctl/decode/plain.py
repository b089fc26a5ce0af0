"""A plain dense decoder, ready to generate without transformers' code of models.

In: what `models.plain` read of a folder. Out: a model that the decode loop takes.
"""

from types import SimpleNamespace

import torch

from llmctl.console import said_if_slow
from llmctl.decode.llama import TOLERANCE, LlamaWeights, PlainModel
from llmctl.models.plain import PlainConfig, blocks_of, read_plain_weights


def load_plain(config: PlainConfig, *, dtype: torch.dtype, device: str) -> PlainModel | None:
    """Load the weights; None where they are not those that config.json describes, or not finite."""
    if dtype not in TOLERANCE or device not in ("cpu", "cuda"):
        return None
    with said_if_slow(f"loading {config.folder}"), torch.inference_mode():
        named = read_plain_weights(config, device)
        if named is None:
            return None
        count = sum(tensor.numel() for tensor in named.values())
        if not all(torch.isfinite(tensor.float().sum()) for tensor in named.values()):
            return None
        half = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device=device).float()
        embedding = named.pop("model.embed_tokens.weight")
        head = embedding if config.tie_word_embeddings else named.pop("lm_head.weight")
        weights = LlamaWeights.fuse(
            embedding,
            blocks_of(named, config.num_hidden_layers),
            named.pop("model.norm.weight"),
            head,
            frequencies=1.0 / config.rope_theta ** (half / config.head_dim),
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_size=config.head_dim,
            epsilon=config.rms_norm_eps,
            dtype=dtype,
        )
    ends = SimpleNamespace(eos_token_id=config.eos_token_id)
    return PlainModel(config, weights, ends, count)

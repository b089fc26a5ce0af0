"""Choose the architecture to train from scratch: presets, sizes, and untrained models."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
)

import llmctl.models.patched_attention  # noqa: F401 (of every model that is made)
from llmctl.config.commands.pretrain import Shape
from llmctl.errors import ModelError, UserError
from llmctl.models.causality import require_causal_config
from llmctl.models.loading import load_config, parameter_count
from llmctl.models.vetting import BROKEN

EXPERTS, EXPERTS_USED = 8, 2  # Mixtral's (Jiang et al., 2024, arXiv:2401.04088)
TIED_BELOW = 2048
"""Input and output embeddings are one matrix in models up to this width."""


@dataclass(frozen=True)
class ModelSize:
    """Sizes of a Llama-style model: RoPE, RMSNorm, SwiGLU, grouped-query attention."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    context: int


PRESETS = {
    "nano": ModelSize(4, 128, 4, 4, 320, 256),
    "tiny": ModelSize(6, 256, 4, 2, 704, 256),
    "mini": ModelSize(8, 384, 6, 2, 1024, 512),
    "small": ModelSize(12, 768, 12, 4, 2048, 1024),
    "medium": ModelSize(24, 1024, 16, 4, 2816, 2048),
    "large": ModelSize(24, 1536, 24, 8, 4096, 2048),
    "1b": ModelSize(16, 2048, 32, 8, 8192, 4096),
    "3b": ModelSize(28, 3072, 24, 8, 8192, 4096),
    "8b": ModelSize(32, 4096, 32, 8, 14336, 8192),
}


def resolve_size(shape: Shape, preset: str) -> ModelSize:
    """Return the preset with the user's sizes; heads and MLP follow a changed width.

    Raises:
        UserError: widths and heads that do not divide.
    """
    size = PRESETS[shape.size or preset]
    if shape.hidden is not None and shape.hidden != size.hidden:
        heads = max(1, shape.hidden // 64)
        while shape.hidden % heads:
            heads -= 1
        intermediate = 64 * math.ceil(shape.hidden * 8 / 3 / 64)
        size = replace(
            size, hidden=shape.hidden, heads=heads, kv_heads=heads, intermediate=intermediate
        )
    if shape.heads is not None and shape.heads != size.heads:
        size = replace(size, heads=shape.heads, kv_heads=shape.heads)
    sizes = {"layers": shape.layers, "kv_heads": shape.kv_heads, "context": shape.context}
    size = replace(size, **{name: value for name, value in sizes.items() if value is not None})
    if size.hidden % size.heads:
        raise UserError(f"--hidden {size.hidden} is not a multiple of --heads {size.heads}")
    if size.heads % size.kv_heads:
        raise UserError(f"--heads {size.heads} is not a multiple of --kv-heads {size.kv_heads}")
    if (size.hidden // size.heads) % 2:
        raise UserError(
            f"heads of odd width {size.hidden // size.heads} (--hidden / --heads): "
            "rotary positions need an even one"
        )
    return size


def new_config(
    shape: Shape, preset: str, vocab_size: int, tokenizer: PreTrainedTokenizerBase | None
) -> PreTrainedConfig:
    """Build the configuration of an untrained model for this tokenizer, or for one not made yet.

    Raises:
        UserError: sizes that do not go together.
        ModelError: `config_from` that cannot be read.
    """
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids: dict[str, int | None] = dict.fromkeys(names)
    if tokenizer is not None:
        ids = {name: getattr(tokenizer, name) for name in names}
    if shape.config_from is not None:
        config = load_config(shape.config_from)
        require_causal_config(config, shape.config_from)
        config.update({**ids, "vocab_size": max(vocab_size, config.vocab_size)})
        return config
    size = resolve_size(shape, preset)
    if shape.arch == "gpt2":
        if size.kv_heads != size.heads and shape.kv_heads is not None:
            raise UserError("--kv-heads does not go with --arch gpt2")
        return GPT2Config(
            vocab_size=vocab_size,
            n_positions=size.context,
            n_embd=size.hidden,
            n_layer=size.layers,
            n_head=size.heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **ids,
        )
    match shape.arch:
        case "llama":
            return llama_config(size, vocab_size, **ids)
        case "qwen3":
            return Qwen3Config(**_llama_fields(size, vocab_size), **ids)
        case "mixtral":
            return MixtralConfig(
                **_llama_fields(size, vocab_size),
                **ids,
                num_local_experts=EXPERTS,
                num_experts_per_tok=EXPERTS_USED,
                output_router_logits=True,
            )


def llama_config(size: ModelSize, vocab_size: int, **ids: int | None) -> LlamaConfig:
    """Build the configuration of a Llama; `ids` are of special tokens."""
    return LlamaConfig(**_llama_fields(size, vocab_size), **ids)


def _llama_fields(size: ModelSize, vocab_size: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab_size,
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.hidden // size.heads,
        "max_position_embeddings": size.context,
        "tie_word_embeddings": size.hidden <= TIED_BELOW,
    }


def count_parameters(config: PreTrainedConfig) -> int:
    """Count the parameters of a model, without allocating them."""
    return parameter_count(meta_model(config))


def meta_model(config: PreTrainedConfig, *, scores: bool = False) -> PreTrainedModel:
    """Build a model on the meta device, or a reward model; raise a ModelError if unknown."""
    kind = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    try:
        with torch.device("meta"):
            model: PreTrainedModel = kind.from_config(config, trust_remote_code=False)
    except BROKEN as error:
        what = "model that scores" if scores else "causal language model"
        raise ModelError(f"not a {what}: {str(error)[:200]}") from None
    return model


def active_parameters(model: PreTrainedModel) -> int:
    """Count the parameters active for one token: of a mixture's experts, those it is routed to."""
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    if not experts:
        return parameter_count(model)
    idle = 1 - float(model.config.num_experts_per_tok / model.config.num_local_experts)
    return int(parameter_count(model) - experts * idle)


def new_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Build an untrained float32 model.

    Matrices that write to the residual stream start smaller by 1/sqrt(2 layers), which keeps its
    variance independent of depth (Radford et al., 2019, section 2.3).
    """
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, trust_remote_code=False
    )
    if config.model_type != "gpt2":  # transformers does it for GPT-2 already
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
                    weight.mul_((2 * config.num_hidden_layers) ** -0.5)
    return model


def flops_per_token(
    parameters: int, config: PreTrainedConfig, context: int, trained: float | None = None
) -> float:
    """Compute training FLOPs for a token: 6 N + 12 L H T (Chowdhery et al., 2022, arXiv:2204.02311,
    appendix B), where all weights train; of frozen ones 4 N.

    Args:
        parameters: active for a token, N.
        config: gives layers L and width H.
        context: tokens per sequence, T.
        trained: those of them that train; None for all.
    """
    attention = 12.0 * config.num_hidden_layers * config.hidden_size * context
    products = 4.0 * parameters + 2.0 * (parameters if trained is None else trained)
    return float(products + attention)

"""The architecture to train from scratch: presets, dials, and untrained models."""

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
    """The preset with the user's dials put in; what depends on a changed width follows it.

    Raises:
        UserError: widths and heads that do not divide.
    """
    dials = PRESETS[shape.size or preset]
    if shape.hidden is not None and shape.hidden != dials.hidden:
        heads = max(1, shape.hidden // 64)
        while shape.hidden % heads:
            heads -= 1
        intermediate = 64 * math.ceil(shape.hidden * 8 / 3 / 64)
        dials = replace(
            dials, hidden=shape.hidden, heads=heads, kv_heads=heads, intermediate=intermediate
        )
    if shape.heads is not None and shape.heads != dials.heads:
        dials = replace(dials, heads=shape.heads, kv_heads=shape.heads)
    given = {"layers": shape.layers, "kv_heads": shape.kv_heads, "context": shape.context}
    dials = replace(dials, **{name: value for name, value in given.items() if value is not None})
    if dials.hidden % dials.heads:
        raise UserError(f"--hidden {dials.hidden} is not a multiple of --heads {dials.heads}")
    if dials.heads % dials.kv_heads:
        raise UserError(f"--heads {dials.heads} is not a multiple of --kv-heads {dials.kv_heads}")
    if (dials.hidden // dials.heads) % 2:
        raise UserError(
            f"heads of odd width {dials.hidden // dials.heads} (--hidden / --heads): "
            "rotary positions need an even one"
        )
    return dials


def new_config(
    shape: Shape, preset: str, vocab_size: int, tokenizer: PreTrainedTokenizerBase | None
) -> PreTrainedConfig:
    """The configuration of an untrained model for this tokenizer, or for one not made yet.

    Raises:
        UserError: sizes that do not go together.
        ModelError: `config_from` that cannot be read.
    """
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids: dict[str, int | None] = dict.fromkeys(names)
    if tokenizer is not None:
        found = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        ids = dict(zip(names, found, strict=True))
    if shape.config_from is not None:
        config = load_config(shape.config_from)
        require_causal_config(config, shape.config_from)
        config.update({**ids, "vocab_size": max(vocab_size, config.vocab_size)})
        return config
    dials = resolve_size(shape, preset)
    if shape.arch == "gpt2":
        if dials.kv_heads != dials.heads and shape.kv_heads is not None:
            raise UserError("--kv-heads does not go with --arch gpt2")
        return GPT2Config(
            vocab_size=vocab_size,
            n_positions=dials.context,
            n_embd=dials.hidden,
            n_layer=dials.layers,
            n_head=dials.heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **ids,
        )
    match shape.arch:
        case "llama":
            return llama_config(dials, vocab_size, **ids)
        case "qwen3":
            return Qwen3Config(**_llama_fields(dials, vocab_size), **ids)
        case "mixtral":
            return MixtralConfig(
                **_llama_fields(dials, vocab_size),
                **ids,
                num_local_experts=EXPERTS,
                num_experts_per_tok=EXPERTS_USED,
                output_router_logits=True,
            )


def llama_config(dials: ModelSize, vocab_size: int, **ids: int | None) -> LlamaConfig:
    """A Llama of these sizes; `ids` are of special tokens."""
    return LlamaConfig(**_llama_fields(dials, vocab_size), **ids)


def _llama_fields(dials: ModelSize, vocab_size: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab_size,
        "hidden_size": dials.hidden,
        "intermediate_size": dials.intermediate,
        "num_hidden_layers": dials.layers,
        "num_attention_heads": dials.heads,
        "num_key_value_heads": dials.kv_heads,
        "head_dim": dials.hidden // dials.heads,
        "max_position_embeddings": dials.context,
        "tie_word_embeddings": dials.hidden <= TIED_BELOW,
    }


def count_parameters(config: PreTrainedConfig) -> int:
    """Parameters of the model, without allocating them."""
    return parameter_count(meta_model(config))


def meta_model(config: PreTrainedConfig, *, scores: bool = False) -> PreTrainedModel:
    """The untrained model without memory for its weights, one that scores texts where asked for.

    Raises:
        ModelError: transformers has no such model of the configuration.
    """
    kind = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    try:
        with torch.device("meta"):
            model: PreTrainedModel = kind.from_config(config, trust_remote_code=False)
    except BROKEN as error:
        what = "model that scores" if scores else "causal language model"
        raise ModelError(f"not a {what}: {str(error)[:200]}") from None
    return model


def active_parameters(model: PreTrainedModel) -> int:
    """Parameters that one token meets: of a mixture's experts, those it is sent to."""
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    if not experts:
        return parameter_count(model)
    idle = 1 - float(model.config.num_experts_per_tok / model.config.num_local_experts)
    return int(parameter_count(model) - experts * idle)


def new_model(config: PreTrainedConfig) -> PreTrainedModel:
    """An untrained float32 model.

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
    """Training FLOPs for a token: 6 N + 12 L H T (Chowdhery et al., 2022, arXiv:2204.02311,
    appendix B), where all weights train; of frozen ones 4 N.

    Args:
        parameters: all that a token meets, N.
        config: gives layers L and width H.
        context: tokens per sequence, T.
        trained: those of them that train; None for all.
    """
    attention = 12.0 * config.num_hidden_layers * config.hidden_size * context
    products = 4.0 * parameters + 2.0 * (parameters if trained is None else trained)
    return float(products + attention)

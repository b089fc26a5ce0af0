"""Tell causal language models from encoders and encoder-decoders, by their configuration alone.

In: a configuration. Out: nothing, or a refusal that says what else can be done with the model.
transformers loads a BERT as a language model, too; its predictions would see their own answers.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llmctl.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def is_encoder(config: PreTrainedConfig) -> bool:
    """Whether a model of this configuration attends to both sides of a token, as BERT does.

    Some architectures do either, by a switch that is off unless a configuration sets it.
    """
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    is_decoder = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    can_be_encoder = (
        type(config) in MODEL_FOR_MASKED_LM_MAPPING or config.model_type == "bert-generation"
    )
    is_bidirectional = getattr(config, "use_bidirectional_attention", None) in (True, "all")
    return (can_be_encoder and not is_decoder) or is_bidirectional


def require_causal_config(config: PreTrainedConfig, source: str | Path) -> None:
    """Raise a ModelError for what is no causal language model; say what it can be used for."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if config.is_encoder_decoder:
        raise ModelError(
            f"{config.model_type} is an encoder-decoder, not a causal language model",
            file=source,
            hint="use a decoder, such as a Llama, Qwen or GPT-2",
        )
    if is_encoder(config):
        raise ModelError(
            f"{config.model_type} is not a causal language model: it reads a text from both sides, "
            "and would see the answers that it is to give",
            file=source,
            hint="make it a classifier (llmctl sft --task classify) or a reward model (llmctl "
            "reward), or use a decoder",
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(
            f"transformers has no causal language model of the architecture {config.model_type}",
            file=source,
            hint="use a decoder, such as a Llama, Qwen or GPT-2",
        )

"""Weights in 4 or 8 bits through bitsandbytes: how to load them, and how to have them back.

Two defects of its CPU code are guarded here and nowhere else. Where a CPU has AVX512-BF16, a 4-bit
layer repacks its weights in place at the first forward pass in eval mode; from then on gradients,
saved files and dequantized weights are wrong, unseen. And NF4 dequantizes wrongly where a layer's
input width is not a multiple of 64.
"""

import logging
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

LoadIn = Literal["full", "8bit", "4bit"]
BLOCK = 64
"""Weights that share a scale in NF4."""
HEADS = ("score", "classifier")
"""Output layers of classifiers; those of language models are found."""

# it is loaded by PEFT and Trainer too, and says on stderr which kernels a CPU has not
for noisy in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
    logging.getLogger(noisy).setLevel(logging.ERROR)


def quantization(config: PreTrainedConfig, load_in: LoadIn, dtype: torch.dtype) -> Any:
    """What `from_pretrained` takes as quantization_config; None for full weights.

    4 bits are NF4 with double quantization (Dettmers et al., 2023, arXiv:2305.14314). The output
    layer stays as it is, and so do layers that NF4 would get wrong.
    """
    if load_in == "full":
        return None
    import bitsandbytes.nn.modules as bitsandbytes_modules
    from transformers import BitsAndBytesConfig

    heads, odd = _kept_layers(config)
    if load_in == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=heads)
    bitsandbytes_modules.has_avx512bf16 = lambda: False
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=heads + odd,
    )


def loaded_in(model: PreTrainedModel) -> LoadIn:
    """How a model's weights are held."""
    how = model.config.to_dict().get("quantization_config") or {}
    return "4bit" if how.get("load_in_4bit") else "8bit" if how.get("load_in_8bit") else "full"


@torch.no_grad()
def copy_dequantized(quantized: PreTrainedModel, full: PreTrainedModel) -> None:
    """Give a model in full precision the values that its quantized copy computes with."""
    layers = dict(full.named_modules())
    for name, module in quantized.named_modules():
        weight = _dequantized(module)
        if weight is None:
            continue
        layer: Any = layers[name]
        # bitsandbytes holds GPT-2's transposed layers the usual way round
        turned = weight.T if isinstance(layer, Conv1D) else weight
        layer.weight.copy_(turned)


def _dequantized(module: Any) -> Tensor | None:
    """A quantized layer's weight; PEFT's function for it spoils 8-bit layers on a CPU."""
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    kind = type(weight).__name__
    if weight is None or kind not in ("Params4bit", "Int8Params"):
        return None
    from bitsandbytes import functional

    if kind == "Params4bit":
        return functional.dequantize_4bit(weight.data, weight.quant_state)  # type: ignore[no-any-return]
    scales = module.state.SCB if weight.SCB is None else weight.SCB
    return functional.int8_vectorwise_dequant(weight.data, scales)  # type: ignore[no-any-return]


def _kept_layers(config: PreTrainedConfig) -> tuple[list[str], list[str]]:
    """Names of the output layers, and of layers whose input NF4 cannot divide into blocks."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    output = model.get_output_embeddings()
    heads = [name for name, module in model.named_modules() if module is output]
    odd = [name for name, module in model.named_modules() if _input_width(module) % BLOCK]
    return [*HEADS, *heads], odd


def _input_width(module: nn.Module) -> int:
    if isinstance(module, Conv1D):
        return int(module.nx)
    return module.in_features if isinstance(module, nn.Linear) else 0

"""Quantization methods: a model in full precision in, a smaller copy out.

Both models are held at once, so that they can be compared.
"""

from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel, TorchAoConfig

from llmctl.config.commands.quantize import QuantizeConfig
from llmctl.errors import ModelError, ResourceError
from llmctl.models.loading import DTYPES
from llmctl.models.quantized import first_not_finite, is_quantized, prepare_library
from llmctl.models.vetting import BROKEN, first_line
from llmctl.quantize.layers import Layers


def check_method(config: QuantizeConfig, device: str) -> None:
    """Refuse a method that is not installed, or that the device cannot do.

    Raises:
        ResourceError: with the alternatives.
    """
    if config.library == "torchao":
        prepare_library("torchao")
        if config.width == 4 and device != "cuda":
            raise ResourceError(
                f"torchao cannot hold 4 bits on {device}: its kernels for them are CUDA's",
                hint="use --bits 8 with torchao, or --method bnb --bits 4",
            )
    elif config.library == "bnb":
        prepare_library("bitsandbytes")


def describe(config: QuantizeConfig) -> str:
    """Name the method for the report."""
    if config.library == "bnb" and config.width == 4:
        double = ", double quantization" if config.double_quant else ""
        return f"bitsandbytes, 4 bits ({config.quant_type}{double})"
    if config.library == "bnb":
        return "bitsandbytes, 8 bits (LLM.int8)"
    if config.library == "torchao":
        quantized = "weights and activations" if config.dynamic else "weights only"
        return f"torchao, {config.width} bits ({quantized})"
    return f"cast to {config.dtype}" if config.gguf is None else f"GGUF {config.gguf}"


def kept_dtype(config: QuantizeConfig, model: PreTrainedModel) -> torch.dtype:
    """Type of the weights that are not quantized."""
    return model.dtype if config.dtype == "auto" else DTYPES[config.dtype]


def quantize_model(
    model: PreTrainedModel, config: QuantizeConfig, layers: Layers
) -> PreTrainedModel:
    """Make a quantized copy of a model on its device, in eval mode.

    Raises:
        ModelError: the method fails, or weights are too large for the type.
    """
    dtype = kept_dtype(config, model)
    quantization_config = None  # for a plain cast
    if config.library is not None:
        make_config = {"bnb": _bitsandbytes_config, "torchao": _torchao_config}[config.library]
        quantization_config = make_config(config, layers, dtype)
    try:
        quantized = copy_model(model, dtype, quantization_config)
    except (*BROKEN, ImportError) as error:
        raise ModelError(f"{config.library} fails on this model: {first_line(error)}") from None
    if (name := first_not_finite(quantized)) is not None:
        raise ModelError(
            f"weights that {str(dtype).removeprefix('torch.')} cannot hold: {name}",
            hint="use --dtype bf16, which has the range of fp32",
        )
    return quantized


def copy_model(
    model: PreTrainedModel, dtype: torch.dtype, quantization_config: Any = None
) -> PreTrainedModel:
    """Copy a model in another type or quantized, on its device; its buffers stay exact."""
    kind: Any = type(model)
    copy: PreTrainedModel = kind.from_pretrained(
        None,
        config=deepcopy(model.config),
        state_dict=dict(model.state_dict()),
        dtype=dtype,
        quantization_config=quantization_config,
        device_map={"": str(model.device)},
    )
    copy.generation_config = deepcopy(model.generation_config)
    return copy.eval()


def quantized_layers(quantized: nn.Module, layers: Layers) -> Layers:
    """The layers that a library has quantized in fact: it may leave some."""
    modules = dict(quantized.named_modules())
    left = [name for name in layers.taken if not is_quantized(modules[name])]
    taken = tuple(name for name in layers.taken if name not in left)
    return Layers(taken, {**layers.kept, **dict.fromkeys(left, "left by the library")})


def _bitsandbytes_config(config: QuantizeConfig, layers: Layers, dtype: torch.dtype) -> Any:
    kept = list(layers.kept)
    if config.width == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.quant_type,
        bnb_4bit_use_double_quant=config.double_quant,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=kept,
    )


def _torchao_config(config: QuantizeConfig, layers: Layers, dtype: torch.dtype) -> Any:
    from torchao import quantization

    if config.width == 4:  # plain packing needs a package that PyPI has only a placeholder of
        method = quantization.Int4WeightOnlyConfig(
            group_size=128, int4_packing_format="tile_packed_to_4d"
        )
    elif config.dynamic:
        method = quantization.Int8DynamicActivationInt8WeightConfig()
    else:
        method = quantization.Int8WeightOnlyConfig()
    return TorchAoConfig(method, modules_to_not_convert=list(layers.kept))

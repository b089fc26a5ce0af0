"""The ways to make a model smaller: a model in full precision in, a smaller one out.

Both models are held at once, so that they can be compared.
"""

from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel, TorchAoConfig

from llmctl.config.commands import QuantizeConfig
from llmctl.errors import ModelError, ResourceError
from llmctl.models.loading import DTYPES
from llmctl.models.quantized import first_not_finite, is_quantized, prepare_library
from llmctl.models.vetting import BROKEN, first_line
from llmctl.quantize.layers import Layers


def check_method(config: QuantizeConfig, device: str) -> None:
    """Refuse what is not installed, or what the device cannot do.

    Raises:
        ResourceError: with what there is to do instead.
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
    """The method as the report calls it."""
    if config.library == "bnb" and config.width == 4:
        double = ", double quantization" if config.double_quant else ""
        return f"bitsandbytes, 4 bits ({config.quant_type}{double})"
    if config.library == "bnb":
        return "bitsandbytes, 8 bits (LLM.int8)"
    if config.library == "torchao":
        what = "weights and activations" if config.dynamic else "weights only"
        return f"torchao, {config.width} bits ({what})"
    return f"cast to {config.dtype}" if config.gguf is None else f"GGUF {config.gguf}"


def kept_dtype(config: QuantizeConfig, model: PreTrainedModel) -> torch.dtype:
    """The type of the weights that are not quantized."""
    return model.dtype if config.dtype == "auto" else DTYPES[config.dtype]


def shrink(model: PreTrainedModel, config: QuantizeConfig, layers: Layers) -> PreTrainedModel:
    """A smaller copy of a model, in eval mode.

    Args:
        model: on its device; as it was afterwards.
        config: how.
        layers: which of them.

    Raises:
        ModelError: the method fails, or weights are too large for the type.
    """
    dtype = kept_dtype(config, model)
    how = {"bnb": _bnb, "torchao": _torchao, None: _nothing}[config.library](config, layers, dtype)
    try:
        small = copy_as(model, dtype, how)
    except (*BROKEN, ImportError) as error:
        raise ModelError(f"{config.library} fails on this model: {first_line(error)}") from None
    if (name := first_not_finite(small)) is not None:
        raise ModelError(
            f"weights that {str(dtype).removeprefix('torch.')} cannot hold: {name}",
            hint="use --dtype bf16, which has the range of fp32",
        )
    return small


def copy_as(model: PreTrainedModel, dtype: torch.dtype, how: Any = None) -> PreTrainedModel:
    """The model once more, in another type or quantized; its buffers stay exact.

    Args:
        model: on its device.
        dtype: of the weights that are not quantized.
        how: transformers' configuration of a method of quantization.
    """
    kind: Any = type(model)
    copy: PreTrainedModel = kind.from_pretrained(
        None,
        config=deepcopy(model.config),
        state_dict=dict(model.state_dict()),
        dtype=dtype,
        quantization_config=how,
        device_map={"": str(model.device)},
    )
    copy.generation_config = deepcopy(model.generation_config)
    return copy.eval()


def left_out(small: nn.Module, layers: Layers) -> Layers:
    """The layers as they came to be: a library may leave some that it was to take."""
    modules = dict(small.named_modules())
    left = [name for name in layers.taken if not is_quantized(modules[name])]
    taken = tuple(name for name in layers.taken if name not in left)
    return Layers(taken, {**layers.kept, **dict.fromkeys(left, "left by the library")})


def _nothing(config: QuantizeConfig, layers: Layers, dtype: torch.dtype) -> None:
    """A plain cast."""


def _bnb(config: QuantizeConfig, layers: Layers, dtype: torch.dtype) -> Any:
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


def _torchao(config: QuantizeConfig, layers: Layers, dtype: torch.dtype) -> Any:
    from torchao import quantization

    if config.width == 4:  # plain packing wants a package that PyPI has only a placeholder of
        how = quantization.Int4WeightOnlyConfig(
            group_size=128, int4_packing_format="tile_packed_to_4d"
        )
    elif config.dynamic:
        how = quantization.Int8DynamicActivationInt8WeightConfig()
    else:
        how = quantization.Int8WeightOnlyConfig()
    return TorchAoConfig(how, modules_to_not_convert=list(layers.kept))

"""Quantized weights: load, measure, dequantize.

Two defects of bitsandbytes' CPU code are guarded here and nowhere else. Where a CPU has
AVX512-BF16, a 4-bit layer repacks its weights in place at the first forward pass in eval mode; from
then on gradients, saved files and dequantized weights are wrong, unseen. And NF4 dequantizes
wrongly where a layer's input width is not a multiple of 64.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from llmctl import optional_imports
from llmctl.errors import ModelError, require_extra

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

LoadIn = Literal["full", "8bit", "4bit"]
BLOCK = 64
"""Weights that share a scale in NF4."""
IN_FEW_BITS = ("Params4bit", "Int8Params")
"""Classes of bitsandbytes' weights."""
HEADS = ("score", "classifier")
"""Output layers of classifiers; those of language models are found."""

# PEFT imports it too, and it says on stderr which kernels a CPU has not
for noisy in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
    logging.getLogger(noisy).setLevel(logging.ERROR)


def quantization_config(config: PreTrainedConfig, load_in: LoadIn, dtype: torch.dtype) -> Any:
    """Build the quantization_config for `from_pretrained`; None for full weights.

    4 bits are NF4 with double quantization (Dettmers et al., 2023, arXiv:2305.14314). The output
    layer stays as it is, and so do layers that NF4 would get wrong.

    Raises:
        ModelError: the weights are in few bits already.
        ResourceError: the library of their format is not installed.
    """
    if (held := saved_precision(config)) is not None:
        if load_in != "full":
            raise ModelError(
                f"this model is quantized already ({held}): it cannot be loaded in "
                f"{load_in.removesuffix('bit')} bits",
                hint=f"drop --load-in-{load_in}",
            )
        prepare_library(held)
        return None
    if load_in == "full":
        return None
    from transformers import BitsAndBytesConfig

    heads, odd = _kept_layers(config)
    if load_in == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=heads)
    prepare_library("bitsandbytes")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=heads + odd,
    )


def prepare_library(library: str) -> None:
    """Prepare a library to load or make weights in few bits, before any layer is built.

    bitsandbytes or torchao, perhaps with the number of bits behind it.

    Raises:
        ResourceError: torchao is not installed.
    """
    name = library.split()[0]
    if name == "torchao":
        require_extra("torchao", "torchao", "a model in its numbers")
        optional_imports.allow("torchao")
    if name == "bitsandbytes":
        import bitsandbytes.nn.modules as bitsandbytes_modules

        bitsandbytes_modules.has_avx512bf16 = lambda: False


def saved_precision(config: PreTrainedConfig) -> str | None:
    """Return library and bits of a model saved quantized, as `bitsandbytes 4 bits`; else None."""
    settings = config.to_dict().get("quantization_config")
    if not settings:
        return None
    method = settings.get("quant_method", "unknown method")
    name = str(method.value if isinstance(method, Enum) else method)
    if name == "bitsandbytes":
        return f"{name} {'4' if settings.get('load_in_4bit') else '8'} bits"
    return name


def require_full(config: PreTrainedConfig, folder: Path | str, what: str) -> None:
    """Raise a ModelError for a model saved quantized, which cannot `what`, as `be trained`."""
    if (held := saved_precision(config)) is not None:
        raise ModelError(
            f"this model is quantized ({held}) and cannot {what}",
            file=folder,
            hint="pass the model that it was made of",
        )


def loaded_in(model: PreTrainedModel) -> LoadIn:
    """Return the precision that a model's weights were loaded in."""
    settings = model.config.to_dict().get("quantization_config") or {}
    if settings.get("load_in_4bit"):
        return "4bit"
    return "8bit" if settings.get("load_in_8bit") else "full"


@torch.no_grad()
def copy_dequantized(quantized: PreTrainedModel, full: PreTrainedModel) -> None:
    """Copy the values that a quantized model computes with into its full-precision twin."""
    layers = dict(full.named_modules())
    for name, module in quantized.named_modules():
        weight = _dequantized(module)
        if weight is None:
            continue
        layer: Any = layers[name]
        # bitsandbytes holds GPT-2's transposed layers the usual way round
        layer.weight.copy_(weight.T if is_transposed(layer) else weight)


def is_quantized(module: nn.Module) -> bool:
    """Whether a layer's weight is in few bits."""
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    if weight is None:
        return False
    return type(weight).__name__ in IN_FEW_BITS or hasattr(weight.data, "__tensor_flatten__")


def memory_bytes_of(model: nn.Module) -> int:
    """Count the bytes of a model's weights and buffers, with the scales of quantized ones.

    `get_memory_footprint` counts weights of torchao as if they were full.
    """
    storages = [tensor.untyped_storage() for _, tensor in stored_tensors(model)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def first_not_finite(model: nn.Module) -> str | None:
    """Return the first weight that is, or has a scale that is, NaN or infinite; else None."""
    for name, tensor in stored_tensors(model, buffers=False):
        if tensor.is_floating_point() and not torch.isfinite(tensor.sum()):
            return name
    return None


def stored_tensors(model: nn.Module, *, buffers: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of a model with the name of the weight that it belongs to."""
    for name, value in model.named_parameters():
        yield from ((name, tensor) for tensor in _plain([value]))
    for name, module in model.named_modules():
        if (scales := _scales(module)) is not None:
            yield f"{name}.weight", scales
    if buffers:
        yield from model.named_buffers()


def _plain(values: list[Any]) -> Iterator[Tensor]:
    """Yield the plain tensors within tensors, their subclasses and quantization states."""
    for value in values:
        if hasattr(value, "__tensor_flatten__"):
            names, _ = value.__tensor_flatten__()
            yield from _plain([getattr(value, name) for name in names])
        elif isinstance(value, Tensor):
            yield value.data
            if type(value).__name__ == "Params4bit":
                state: Any = value
                yield from _plain(list(state.quant_state.as_dict().values()))


def _scales(module: Any) -> Tensor | None:
    """Return the scales of an 8-bit layer, which keeps them in one of two places."""
    weight: Any = dict(module.named_parameters(recurse=False)).get("weight")
    if type(weight).__name__ != "Int8Params":
        return None
    scales: Tensor | None = module.state.SCB if weight.SCB is None else weight.SCB
    return scales


def _dequantized(module: Any) -> Tensor | None:
    """Dequantize a layer's weight; PEFT's function for it spoils 8-bit layers on a CPU."""
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    kind = type(weight).__name__
    if weight is None or kind not in IN_FEW_BITS:
        return None
    from bitsandbytes import functional

    if kind == "Params4bit":
        return functional.dequantize_4bit(weight.data, weight.quant_state)  # type: ignore[no-any-return]
    return functional.int8_vectorwise_dequant(weight.data, _scales(module))  # type: ignore[no-any-return]


def _kept_layers(config: PreTrainedConfig) -> tuple[list[str], list[str]]:
    """Name the output layers, and layers whose input NF4 cannot divide into blocks."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    output = model.get_output_embeddings()
    heads = [name for name, module in model.named_modules() if module is output]
    odd = [name for name, module in model.named_modules() if input_width(module) % BLOCK]
    return [*HEADS, *heads], odd


def is_transposed(module: nn.Module) -> bool:
    """Whether a layer is a linear one that holds its weight as (in, out), as GPT-2's are."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def input_width(module: nn.Module) -> int:
    """Return the input size of a linear layer; 0 for other layers."""
    if is_transposed(module):
        return int(module.nx)  # type: ignore[arg-type]
    return module.in_features if isinstance(module, nn.Linear) else 0

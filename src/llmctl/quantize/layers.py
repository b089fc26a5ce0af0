"""Choose the layers to quantize.

In: a model, perhaps without weights, and the method. Out: names, with a reason for each layer that
is kept.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from llmctl.config.commands.quantize import QuantizeConfig
from llmctl.errors import ModelError, UserError
from llmctl.models.quantized import BLOCK, input_width

CPU_BLOCK = 32
"""Outputs of a layer in 4 bits that bitsandbytes packs together on a CPU with AVX512-BF16. llmctl
does not let it, but whoever opens the folder with transformers alone gets an AssertionError."""
TORCHAO_BLOCK = 128
"""Weights that share a scale in 4 bits of torchao."""


@dataclass(frozen=True)
class Layers:
    """Linear layers of a model: quantized ones, and those kept in full precision."""

    taken: tuple[str, ...]
    kept: dict[str, str]
    """Name -> reason."""

    def summary(self) -> list[str]:
        """A line for each reason, with the layers that it keeps."""
        reasons: dict[str, list[str]] = {}
        for name, reason in self.kept.items():
            reasons.setdefault(reason, []).append(name)
        return [f"{_first_names(names)}: {reason}" for reason, names in reasons.items()]


def choose_layers(model: Any, config: QuantizeConfig) -> Layers:
    """Choose among all linear layers of a model, which may be on the device meta.

    Raises:
        ModelError: every layer would be kept.
        UserError: a layer to keep that the model lacks.
    """
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    by_flag = kept_by_flag(model, config)
    output = model.get_output_embeddings()
    is_tied = output is not None and output.weight is model.get_input_embeddings().weight
    kept = {}
    for name, module in linear.items():
        if module is output:
            kept[name] = f"the output layer{', tied to the embedding' if is_tied else ''}"
        elif name in by_flag:
            kept[name] = "--keep"
        elif (reason := _misfit(module, config)) is not None:
            kept[name] = reason
    layers = Layers(tuple(name for name in linear if name not in kept), kept)
    if not layers.taken:
        reasons = "; ".join(layers.summary()) or f"{type(model).__name__} has no linear layer"
        raise ModelError(
            f"every layer would be kept as it is: {reasons}",
            hint="choose another method (--bits 8), or a plain cast: --dtype bf16",
        )
    return layers


def kept_by_flag(model: nn.Module, config: QuantizeConfig) -> frozenset[str]:
    """Names of the layers that `--keep` names; of tied ones either name means both.

    Raises:
        UserError: a name that the model lacks.
    """
    wanted = [part.strip() for text in config.keep for part in text.split(",") if part.strip()]
    names = [name for name, _ in model.named_modules() if name]
    for part in wanted:
        if not any(_is_in(part, name) for name in names):
            words = {word for name in names for word in (name, name.rpartition(".")[2])}
            close = difflib.get_close_matches(part, sorted(words), n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else ""
            hint = hint or f"it has {_first_names(names)}"
            raise UserError(f"--keep {part}: the model has no such layer", hint=hint)
    modules = matrix_modules(model)
    kept = {id(m.weight) for n, m in modules.items() if any(_is_in(part, n) for part in wanted)}
    return frozenset(name for name, module in modules.items() if id(module.weight) in kept)


def matrix_modules(model: nn.Module) -> dict[str, Any]:
    """Linear layers and embeddings by name."""
    kinds = (nn.Linear, Conv1D, nn.Embedding)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def _misfit(module: Any, config: QuantizeConfig) -> str | None:
    """The reason why the method cannot take a layer; None where it can."""
    inputs = input_width(module)
    outputs = int(module.nf) if isinstance(module, Conv1D) else int(module.out_features)
    if config.library == "torchao" and isinstance(module, Conv1D):
        return "a transposed layer, which torchao does not take"
    if config.width != 4:
        return None
    block = BLOCK if config.library == "bnb" else TORCHAO_BLOCK
    if inputs % block:
        return f"{inputs:,} inputs, not a multiple of {block}"
    if config.library == "bnb" and outputs % CPU_BLOCK:
        return f"{outputs:,} outputs, not a multiple of {CPU_BLOCK}"
    return None


def _is_in(part: str, name: str) -> bool:
    """Whether whole components of a module's name spell `part`."""
    return f".{part}." in f".{name}."


def _first_names(names: Sequence[str]) -> str:
    """Up to three names, or two and the number of all."""
    if len(names) <= 3:
        return ", ".join(names)
    return f"{names[0]}, {names[1]}, … ({len(names)} layers)"

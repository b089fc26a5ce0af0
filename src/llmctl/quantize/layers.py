"""Which layers of a model a method of quantization takes, and why it leaves the others.

In: a model, perhaps without weights, and the method. Out: names, with a reason for each that is
kept.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from llmctl.config.commands import QuantizeConfig
from llmctl.errors import ModelError, UserError
from llmctl.models.quantized import BLOCK, input_width

CPU_BLOCK = 32
"""Outputs of a layer in 4 bits that bitsandbytes packs together on a CPU with AVX512-BF16. llmctl
does not let it, but whoever opens the folder with transformers alone gets an AssertionError."""
TORCHAO_BLOCK = 128
"""Weights that share a scale in 4 bits of torchao."""


@dataclass(frozen=True)
class Layers:
    """The linear layers of a model."""

    taken: tuple[str, ...]
    kept: dict[str, str]
    """Name to reason."""

    def summary(self) -> list[str]:
        """A line for each reason, with how many layers it keeps."""
        reasons: dict[str, list[str]] = {}
        for name, reason in self.kept.items():
            reasons.setdefault(reason, []).append(name)
        return [f"{_few(names)}: {reason}" for reason, names in reasons.items()]


def choose_layers(model: Any, config: QuantizeConfig) -> Layers:
    """Go through all linear layers of a model.

    Args:
        model: of any weights, or of none (on the device meta).
        config: the method, and layers to keep.

    Raises:
        ModelError: every layer would be kept.
        UserError: a layer to keep that the model has not.
    """
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    asked = asked_to_keep(model, config)
    output = model.get_output_embeddings()
    is_tied = output is not None and output.weight is model.get_input_embeddings().weight
    kept = {}
    for name, module in linear.items():
        if module is output:
            kept[name] = f"the output layer{', tied to the embedding' if is_tied else ''}"
        elif name in asked:
            kept[name] = "--keep"
        elif (reason := _misfit(module, config)) is not None:
            kept[name] = reason
    layers = Layers(tuple(name for name in linear if name not in kept), kept)
    if not layers.taken:
        found = "; ".join(layers.summary()) or f"{type(model).__name__} has no linear layer"
        raise ModelError(
            f"every layer would be kept as it is: {found}",
            hint="choose another method (--bits 8), or a plain cast: --dtype bf16",
        )
    return layers


def asked_to_keep(model: nn.Module, config: QuantizeConfig) -> frozenset[str]:
    """Names of the layers with weights that `--keep` means; of tied ones either means both.

    Raises:
        UserError: a name that the model has not.
    """
    wanted = [part.strip() for text in config.keep for part in text.split(",") if part.strip()]
    _require_known(wanted, [name for name, _ in model.named_modules() if name])
    named = matrices(model)
    meant = {id(m.weight) for n, m in named.items() if any(_is_in(part, n) for part in wanted)}
    return frozenset(name for name, module in named.items() if id(module.weight) in meant)


def matrices(model: nn.Module) -> dict[str, Any]:
    """The layers that multiply by a matrix or look up its rows, by name."""
    kinds = (nn.Linear, Conv1D, nn.Embedding)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def _misfit(module: Any, config: QuantizeConfig) -> str | None:
    """Why the method cannot take a layer."""
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
    """Whether whole components of a module's name spell what was asked for."""
    return f".{part}." in f".{name}."


def _require_known(wanted: Sequence[str], names: Sequence[str]) -> None:
    for part in wanted:
        if not any(_is_in(part, name) for name in names):
            words = {word for name in names for word in (name, name.rpartition(".")[2])}
            close = difflib.get_close_matches(part, sorted(words), n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else f"it has {_few(names)}"
            raise UserError(f"--keep {part}: the model has no such layer", hint=hint)


def _few(names: Sequence[str]) -> str:
    """At most three names, and how many there are."""
    if len(names) <= 3:
        return ", ".join(names)
    return f"{names[0]}, {names[1]}, … ({len(names)} layers)"

"""Prepare a quantization: find and check the model and its text, before any weight is read.

In: a config. Out: a `QuantizationJob`, which loads the model in full precision.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from llmctl.config.commands.quantize import QuantizeConfig
from llmctl.console import log
from llmctl.errors import ModelError, UserError
from llmctl.files import sha256_folder
from llmctl.gguf_file import check_gguf
from llmctl.hardware import memory_left
from llmctl.models import hub
from llmctl.models.adapters import CONFIG, is_adapter, read_adapter, weights_sha256
from llmctl.models.causality import require_causal_config
from llmctl.models.loading import (
    DTYPES,
    load_causal_lm,
    load_config,
    load_tokenizer,
    local_folder,
    parameter_count,
)
from llmctl.models.merging import Mergeable, find_mergeable, merge
from llmctl.models.quantized import require_full
from llmctl.models.vetting import BROKEN, first_line, read_object
from llmctl.numbers import counted
from llmctl.quantize.held_out import HeldOut, find_held_out
from llmctl.quantize.layers import Layers, choose_layers
from llmctl.quantize.methods import copy_model, describe
from llmctl.runs.directory import resolve_model

NAMES = {dtype: name for name, dtype in DTYPES.items()}
FREE_FACTOR = 1.2
"""Free memory, in sizes of a copy, without which none is made only to be timed."""


@dataclass(frozen=True)
class QuantizationJob:
    """A model that can be quantized, and the text to measure it on."""

    reference: str
    adapter: Mergeable | None
    """Where an adapter is to be merged first."""
    tokenizer: PreTrainedTokenizerBase
    text: HeldOut
    layers: Layers
    device: str

    def inputs(self) -> list[dict[str, Any]]:
        """For the manifest."""
        if self.adapter is not None:
            digests = [
                ("adapter", self.reference, sha256_folder(self.adapter.adapter.folder)),
                ("base", str(self.adapter.base), weights_sha256(self.adapter.base)),
            ]
        else:
            folder = local_folder(resolve_model(self.reference))
            digests = [("model", self.reference, weights_sha256(folder))]
        own = [hub.model_input(role, path, digest) for role, path, digest in digests]
        return [*own, *({**entry, "role": "eval-text"} for entry in self.text.inputs)]

    def load(self) -> PreTrainedModel:
        """Load the model in its own type, or merge it in float32; in eval mode.

        Raises:
            ModelError: it does not load, its weights are not finite, or it does not merge.
        """
        if self.adapter is not None:
            merged = merge(self.adapter, self.device)
            log.info("merged: logits differ from the adapter's by at most %.2g", merged.difference)
            return merged.model.eval()
        shape = load_config(self.reference)
        return load_causal_lm(
            self.reference, dtype=shape.dtype or torch.float32, device=self.device
        )


def prepare(config: QuantizeConfig, device: str) -> QuantizationJob:
    """Find the model, its layers and its text, and check that they fit the method.

    Raises:
        DataError: no text to measure on.
        ModelError: quantized already, no language model, an adapter without `--merge`, or no layer
            that the method takes.
        UserError: flags that do not go with this model.
    """
    folder = local_folder(resolve_model(config.model))
    adapter = find_mergeable(config.model) if config.merge else None
    if adapter is not None:
        folder = adapter.adapter.folder
    elif is_adapter(folder):
        read_adapter(folder)
        raise ModelError(
            "an adapter cannot be quantized by itself",
            file=folder,
            hint="merge it into its base first: add --merge",
        )
    shape = load_config(str(folder))
    require_full(shape, config.model, "be quantized again")
    is_headed = is_adapter(folder) and read_object(folder / CONFIG).get("task_type") == "SEQ_CLS"
    if is_headed or any("Classification" in name for name in shape.architectures or []):
        raise ModelError(
            "this model tells labels or scores texts; only language models can be quantized",
            file=config.model,
            hint="load it as it is: it is used for scoring, not for generating",
        )
    require_causal_config(shape, config.model)
    own = torch.float32 if adapter is not None else shape.dtype
    if config.library is None and config.gguf is None and own == DTYPES[config.dtype]:
        raise UserError(f"--dtype {config.dtype}: the weights are in that type already")
    try:
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(shape, trust_remote_code=False)
    except BROKEN as error:
        raise ModelError(f"no language model: {first_line(error)}", file=config.model) from None
    layers = choose_layers(empty, config)
    tokenizer = load_tokenizer(str(folder))
    if config.gguf is not None:
        check_gguf(shape, tokenizer)
    text = find_held_out(config, tokenizer)
    return QuantizationJob(config.model, adapter, tokenizer, text, layers, device)


def announce(job: QuantizationJob, config: QuantizeConfig) -> None:
    """Log what a run would do."""
    log.info("would make %s smaller: %s, on %s", job.reference, describe(config), job.device)
    log.info("would measure on %s tokens of %s", f"{job.text.tokens:,}", job.text.name)
    if config.library is not None:
        log.info("%s would be quantized", counted(len(job.layers.taken), "layer"))
        for line in job.layers.summary():
            log.info("would keep %s", line)


def baselines(before: PreTrainedModel, config: QuantizeConfig) -> dict[str, PreTrainedModel]:
    """The model in full precision, in its own type first; on a CPU in fp32 or bf16, too.

    A quantized model may be slower than either; which of them is faster differs among CPUs.
    """
    own = NAMES[before.dtype]
    other = "bf16" if own == "fp32" else "fp32"
    models = {own: before}
    is_cast_to = config.library is None and config.dtype == other
    size = parameter_count(before) * DTYPES[other].itemsize
    if before.device.type == "cpu" and not is_cast_to and memory_left() > FREE_FACTOR * size:
        models[other] = copy_model(before, DTYPES[other])
    return models


def quantized_share(model: PreTrainedModel, layers: Layers) -> float:
    """Share of a full model's weights that the layers hold."""
    modules: dict[str, Any] = dict(model.named_modules())
    weights = [modules[name].weight for name in layers.taken]
    sizes = {id(weight): int(weight.numel()) for weight in weights}  # tied ones count once
    return sum(sizes.values()) / parameter_count(model)


def weights_size(folder: Path) -> int:
    """Bytes of a folder's weights."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))

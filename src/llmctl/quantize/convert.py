"""Make the smaller model, compare it, and write it where the gate holds.

In: a `Job`. Out: a folder that `from_pretrained` opens or a GGUF file, and the `Report` on it.
"""

import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmctl.config.commands import QuantizeConfig
from llmctl.errors import ModelError
from llmctl.evaluate.perplexity import Window, window_logits
from llmctl.files import replace_folder
from llmctl.gguf_file import read_back, write_gguf
from llmctl.models.loading import load_causal_lm, save_model
from llmctl.models.quantized import memory_bytes_of
from llmctl.quantize.compare import compare, time_generation, windows_of, write_samples
from llmctl.quantize.layers import Layers, asked_to_keep, matrices
from llmctl.quantize.methods import describe, kept_dtype, left_out, shrink
from llmctl.quantize.prepare import Job, quantized_share, rivals, weights_size
from llmctl.quantize.results import Report, Sizes

NO_LAYERS = Layers((), {})
"""Of a model that is only cast."""
WIDTH = "a width that is not a multiple of 32, written in f16"


def make_folder(job: Job, config: QuantizeConfig, folder: Path) -> Report:
    """Write the smaller model as a Hugging Face folder.

    What is written is read back, and must give the very logits that were measured.

    Args:
        job: what to make smaller.
        config: how.
        folder: where to.

    Raises:
        GateError: it lost more than it may; nothing was written.
        ModelError: the method fails on this model, or what was written is not what was measured.
    """
    before = job.load()
    after = shrink(before, config, job.layers)
    layers = NO_LAYERS if config.library is None else left_out(after, job.layers)
    dtype = kept_dtype(config, before)
    timed = {**rivals(before, config), "after": after}
    report, windows = _examine(job, config, after, layers, timed)
    del before, timed
    probe = [min(windows, key=lambda window: len(window.tokens))]
    measured, _ = window_logits(after, probe)  # before saving, which may change a live model
    save_model(after, after.state_dict(), job.tokenizer, folder)
    again = load_causal_lm(str(folder), dtype=dtype, device=job.device)
    _require_same(measured, window_logits(again, probe)[0])
    return replace(report, after=Sizes(weights_size(folder), report.after.memory))


MOST_KL = {"f16": 0.01, "bf16": 0.05, "q8_0": 0.2}
"""Nats a token that rounding to these types cannot explain; some ten times what was measured."""


def make_gguf(job: Job, config: QuantizeConfig, folder: Path) -> tuple[Report, Path]:
    """Write a file for llama.cpp; what is measured is what transformers reads back from it.

    Args:
        job: what to make smaller.
        config: the kind of file, and layers to keep.
        folder: where to.

    Raises:
        GateError: it lost more than it may; nothing was kept.
        ModelError: a model or tokenizer that llama.cpp has no place for.
    """
    assert config.gguf is not None
    staging = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    before = job.load()
    file = staging / f"model-{config.gguf}.gguf"
    asked = asked_to_keep(before, config)
    written = write_gguf(before, job.tokenizer, file, config.gguf, asked)
    after = read_back(file, before.config).to(job.device)
    layers = NO_LAYERS
    if config.gguf in ("q8_0", "q4_0"):
        kept = {name: "--keep" if name in asked else WIDTH for name in written.kept}
        named = matrices(before)
        held = {id(named[name].weight) for name in kept}  # a tied one has another name, too
        layers = Layers(
            tuple(n for n, module in named.items() if id(module.weight) not in held), kept
        )
    report, _ = _examine(job, config, after, layers, rivals(before, config))
    apart = report.fidelity.kl
    if apart > MOST_KL.get(config.gguf, math.inf):
        raise ModelError(
            f"what was read back from the file says something else: mean KL {apart:.3g}",
            hint="this is a fault of llmctl's; please report the model's architecture",
        )
    replace_folder(staging, folder)
    sizes = Sizes(written.bytes, written.bytes)  # llama.cpp maps the file, blocks as they are
    return replace(report, after=sizes), folder / file.name


def _examine(
    job: Job,
    config: QuantizeConfig,
    after: PreTrainedModel,
    layers: Layers,
    timed: dict[str, PreTrainedModel],
) -> tuple[Report, Sequence[Window]]:
    """Measure both models, and hold the gate.

    Args:
        job: gives the text.
        config: gives the gate.
        after: the smaller model.
        layers: of it.
        timed: models to generate with; the first is the one before.
    """
    before = next(iter(timed.values()))
    windows = windows_of(job.text.documents, before)
    prompts, count = job.text.prompts, config.sample_tokens
    report = Report(
        method=describe(config),
        text=job.text.name,
        layers=layers,
        share=quantized_share(before, layers),
        before=Sizes(job.disk_before(), memory_bytes_of(before)),
        after=Sizes(None, memory_bytes_of(after)),
        fidelity=compare(before, after, windows),
        speeds=time_generation(timed, prompts, count),
        samples=write_samples(before, after, job.tokenizer, prompts, count),
    )
    report.hold(config.max_perplexity_increase)
    return report, windows


def _require_same(measured: Tensor, written: Tensor) -> None:
    """Refuse a folder that opens as another model than the one that the report is about.

    Args:
        measured: its logits.
        written: those of what was read back.

    Raises:
        ModelError: with the largest difference.
    """
    if not torch.equal(measured, written):
        raise ModelError(
            "the model that was written gives other logits than the one that was measured (by up "
            f"to {float((measured - written).abs().max()):.3g}): it was not kept",
            hint="try another --method, and report it with the versions in `llmctl --version`",
        )

"""Quantize a model, compare it with the original, and write it where the gate holds.

In: a `QuantizationJob`. Out: a folder that `from_pretrained` opens or a GGUF file, and the
`QuantizationReport` on it.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from llmctl.config.commands.quantize import QuantizeConfig
from llmctl.errors import ModelError
from llmctl.evaluate.perplexity import Window, window_logits
from llmctl.files import filled_folder
from llmctl.gguf_file import read_back, write_gguf
from llmctl.models.loading import load_causal_lm, local_folder, save_model
from llmctl.models.quantized import memory_bytes_of
from llmctl.quantize.fidelity import (
    generate_samples,
    measure_fidelity,
    measurement_windows,
    time_generation,
)
from llmctl.quantize.job import QuantizationJob, baselines, quantized_share, weights_size
from llmctl.quantize.layers import Layers, kept_by_flag, matrix_modules
from llmctl.quantize.methods import describe, kept_dtype, quantize_model, quantized_layers
from llmctl.quantize.results import QuantizationReport, WeightBytes
from llmctl.runs.directory import resolve_model

NO_LAYERS = Layers((), {})
"""For a model that is only cast."""
WIDTH = "a width that is not a multiple of 32, written in f16"


def convert_to_folder(
    job: QuantizationJob, config: QuantizeConfig, folder: Path
) -> QuantizationReport:
    """Write the quantized model as a Hugging Face folder.

    The folder is read back, and must give exactly the logits that were measured.

    Raises:
        GateError: it lost more than it may; nothing was written.
        ModelError: the method fails on this model, or the folder is not the measured model.
    """
    before = job.load()
    after = quantize_model(before, config, job.layers)
    layers = NO_LAYERS if config.library is None else quantized_layers(after, job.layers)
    dtype = kept_dtype(config, before)
    timed = {**baselines(before, config), "after": after}
    report, windows = _measure(job, config, after, layers, timed)
    del before, timed
    probe = [min(windows, key=lambda window: len(window.tokens))]
    measured, _ = window_logits(after, probe)  # before saving, which may change a live model
    save_model(after, after.state_dict(), job.tokenizer, folder)
    reloaded = load_causal_lm(str(folder), dtype=dtype, device=job.device)
    written, _ = window_logits(reloaded, probe)
    if not torch.equal(measured, written):
        raise ModelError(
            "the model that was written gives other logits than the one that was measured (by up "
            f"to {float((measured - written).abs().max()):.3g}): it was not kept",
            hint="try another --method, and report it with the versions in `llmctl --version`",
        )
    return replace(report, after=WeightBytes(weights_size(folder), report.after.memory))


MAX_KL = {"f16": 0.01, "bf16": 0.05, "q8_0": 0.2}
"""Nats per token that rounding to these types cannot explain: some ten times the measured ones."""


def convert_to_gguf(
    job: QuantizationJob, config: QuantizeConfig, folder: Path
) -> tuple[QuantizationReport, Path]:
    """Write a file for llama.cpp, and measure the model that transformers reads back from it.

    Raises:
        GateError: it lost more than it may; nothing was kept.
        ModelError: a model or tokenizer that GGUF cannot hold.
    """
    assert config.gguf is not None
    before = job.load()
    with filled_folder(folder) as staging:
        file = staging / f"model-{config.gguf}.gguf"
        by_flag = kept_by_flag(before, config)
        written = write_gguf(before, job.tokenizer, file, config.gguf, by_flag)
        after = read_back(file, before.config).to(job.device)
        layers = NO_LAYERS
        if config.gguf in ("q8_0", "q4_0"):
            kept = {name: "--keep" if name in by_flag else WIDTH for name in written.kept}
            modules = matrix_modules(before)
            held = {id(modules[name].weight) for name in kept}  # a tied one has another name, too
            layers = Layers(
                tuple(n for n, module in modules.items() if id(module.weight) not in held), kept
            )
        report, _ = _measure(job, config, after, layers, baselines(before, config))
        kl = report.fidelity.kl
        if kl > MAX_KL.get(config.gguf, math.inf):
            raise ModelError(
                f"what was read back from the file says something else: mean KL {kl:.3g}",
                hint="this is a fault of llmctl's; please report the model's architecture",
            )
    sizes = WeightBytes(written.bytes, written.bytes)  # llama.cpp maps the file, blocks as they are
    return replace(report, after=sizes), folder / file.name


def _measure(
    job: QuantizationJob,
    config: QuantizeConfig,
    after: PreTrainedModel,
    layers: Layers,
    timed: dict[str, PreTrainedModel],
) -> tuple[QuantizationReport, Sequence[Window]]:
    """Measure the model before, the first of `timed`, and the one after, and check the gate."""
    before = next(iter(timed.values()))
    windows = measurement_windows(job.text.documents, before)
    prompts, count = job.text.prompts, config.sample_tokens
    disk = None  # a merged model has no files
    if job.adapter is None:
        disk = weights_size(local_folder(resolve_model(job.reference)))
    report = QuantizationReport(
        method=describe(config),
        text=job.text.name,
        layers=layers,
        share=quantized_share(before, layers),
        before=WeightBytes(disk, memory_bytes_of(before)),
        after=WeightBytes(None, memory_bytes_of(after)),
        fidelity=measure_fidelity(before, after, windows),
        speeds=time_generation(timed, prompts, count),
        samples=generate_samples(
            before, after, job.tokenizer, prompts, count, job.text.end_of_answer
        ),
    )
    report.check_gate(config.max_perplexity_increase)
    return report, windows

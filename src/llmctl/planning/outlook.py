"""Outlook of a run before it runs: a `Workload` in, one object and a block of text out."""

import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TextIO

import torch

from llmctl import hardware
from llmctl.config.sections import Resumable
from llmctl.console import log, rank, show_recipe
from llmctl.numbers import byte_size, counted, duration, short_number
from llmctl.planning import compute
from llmctl.planning.compute import PF_DAY, Rate, expected_rate, flops_per_step, flops_per_token
from llmctl.planning.memory import MemoryEstimate, estimate_memory, kv_cache_bytes
from llmctl.planning.placement import (
    FittingFlags,
    ShardingOption,
    bytes_per_parameter,
    find_fitting_flags,
    sharding_options,
)
from llmctl.planning.workload import Workload

WIDTH = 12
"""Characters of the first column."""


@dataclass(frozen=True)
class Outlook:
    """Memory, FLOPs, time, sharding and flags of a run."""

    workload: Workload
    memory: MemoryEstimate
    flops_per_token: float
    flops_per_step: float
    rate: Rate | None
    tokens_per_second: float | None
    """Over all devices, given or from the rate."""
    capacity: float
    """Bytes of a device."""
    sharding: list[ShardingOption]
    fitting: FittingFlags | None
    """None where nothing makes it fit."""
    notes: tuple[str, ...] = ()

    @property
    def flops(self) -> float | None:
        """FLOPs of the whole run."""
        steps = self.workload.steps
        return None if steps is None else steps * self.flops_per_step

    @property
    def seconds(self) -> float | None:
        """Seconds of training, without evaluation and saving."""
        if self.workload.tokens is None or self.tokens_per_second is None:
            return None
        return self.workload.tokens / self.tokens_per_second

    def as_json(self) -> dict[str, Any]:
        """Return every number."""
        workload, shape, memory = self.workload, self.workload.shape, self.memory
        return {
            "stage": workload.stage,
            "device": workload.device,
            "devices": workload.world,
            "parameters": {
                **shape.parts,
                "total": shape.parameters,
                "active": shape.active,
                "trained": workload.trained,
            },
            "run": {
                "steps": workload.steps,
                "tokens": workload.tokens,
                "tokens_per_step": workload.tokens_per_step,
                "batch_size": workload.batch_size,
                "grad_accum": workload.grad_accum,
                "length": workload.length,
                "precision": workload.precision,
                "optimizer": workload.optimizer,
            },
            "evaluation": None if workload.evaluation is None else asdict(workload.evaluation),
            "memory": {
                "parts": {name: round(size) for name, size in memory.parts.items()},
                "phases": {name: round(size) for name, size in memory.phases.items()},
                "peak": round(memory.peak),
                "peak_phase": memory.peak_phase,
                "host": round(memory.host),
                "bytes_per_parameter": bytes_per_parameter(workload),
                "kv_cache_per_token": round(kv_cache_bytes(workload, 1, 1)),
                "device": round(self.capacity),
            },
            "compute": {
                "flops_per_token": self.flops_per_token,
                "flops_per_step": self.flops_per_step,
                "flops": self.flops,
                "pf_days": None if self.flops is None else self.flops / PF_DAY,
                "rate": None if self.rate is None else asdict(self.rate),
                "tokens_per_second": self.tokens_per_second,
                "seconds": self.seconds,
            },
            "scaling": scaling_laws(workload),
            "sharding": [asdict(option) for option in self.sharding],
            "flags": None if self.fitting is None else self.fitting.flags,
            "notes": list(self.notes),
        }


def make_outlook(
    workload: Workload,
    config: Any,
    *,
    capacity: float | None = None,
    tflops: float | None = None,
    tokens_per_second: float | None = None,
    rate: Rate | None = None,
    notes: tuple[str, ...] = (),
) -> Outlook:
    """Make the outlook of a workload, from the configuration of its model.

    The capacity is in bytes of a device, by default of this machine's. The speed is measured
    (`rate`), given in 10^12 FLOPs a second of a device (`tflops`), or in tokens over all devices.
    """
    config = config.get_text_config()
    capacity = capacity or device_memory(workload.device)
    per_step = flops_per_step(workload, config)
    rate = rate or expected_rate(workload, tflops)
    if tokens_per_second is None and rate is not None:
        tokens_per_second = rate.flops * workload.world * workload.tokens_per_step / per_step
    return Outlook(
        workload,
        estimate_memory(workload),
        flops_per_token(workload, config),
        per_step,
        rate,
        tokens_per_second,
        capacity,
        sharding_options(workload, workload.world, capacity),
        find_fitting_flags(workload, workload.world, capacity),
        notes,
    )


def device_memory(device: str) -> float:
    """Bytes of this machine's GPU, or of its memory that its cgroups grant."""
    if device == "cuda" and torch.cuda.is_available():
        return float(torch.cuda.mem_get_info()[1])
    return float(hardware.memory_total())


def scaling_laws(workload: Workload) -> dict[str, Any]:
    """Best tokens and losses by scaling laws; the loss of the run itself for pretraining.

    The laws are of models whose tokens meet all parameters.
    """
    active, parts = workload.shape.active, workload.shape.parts
    inner = max(1, active - parts["embedding"] - parts["head"])
    tokens = workload.tokens if workload.stage == "pretrain" else None
    laws = {
        "hoffmann_2022": (active, compute.HOFFMANN.best_tokens, compute.HOFFMANN.loss),
        "besiroglu_2024": (active, compute.BESIROGLU.best_tokens, compute.BESIROGLU.loss),
        "kaplan_2020": (inner, compute.kaplan_tokens, compute.kaplan_loss),
    }
    return {
        name: {
            "best_tokens": best_tokens(parameters),
            "loss_at_best": loss(parameters, best_tokens(parameters)),
            "loss": None if tokens is None else loss(parameters, tokens),
        }
        for name, (parameters, best_tokens, loss) in laws.items()
    }


def outlook_lines(outlook: Outlook) -> list[str]:
    """Lines of the block: a label, then text."""
    rows = [
        *_parameters(outlook),
        *_memory(outlook),
        *_compute(outlook),
        *_tokens(outlook),
        *_sharding(outlook),
        *(("note", note) for note in outlook.notes),
    ]
    shown, last = [], ""
    for name, text in rows:
        shown.append(f"{'' if name == last else name:<{WIDTH}}{text}")
        last = name
    return shown


def print_lines(lines: Sequence[str], stream: TextIO) -> None:
    """Print lines, their first column in bold on a terminal."""
    if not stream.isatty():
        print("\n".join(lines), file=stream)
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(file=stream, highlight=False)
    for line in lines:
        text = Text(line)
        text.stylize("bold cyan", 0, WIDTH)
        console.print(text, soft_wrap=True)


def show_dry_run(stage: str, config: Resumable, outlook: Outlook) -> dict[str, Any] | None:
    """Print the recipe on stdout, the block on stderr; with --json return both in one object."""
    if log.isEnabledFor(logging.INFO) and rank() == 0:
        print_lines(outlook_lines(outlook), sys.stderr)
    return show_recipe(stage, config, outlook.as_json())


def _parameters(outlook: Outlook) -> list[tuple[str, str]]:
    workload, shape = outlook.workload, outlook.workload.shape
    parts = ", ".join(
        f"{name} {short_number(count)}" for name, count in shape.parts.items() if count
    )
    devices = (f"{workload.world} x " if workload.world > 1 else "") + workload.device
    train = f"{workload.trained:,} train" if workload.trained != shape.parameters else "all train"
    mixture = f", {shape.active:,} for a token" if shape.active != shape.parameters else ""
    return [
        ("plan", f"{workload.stage} of {shape.kind}, {workload.precision} on {devices}"),
        ("parameters", f"{shape.parameters:,}{mixture}, {train}"),
        ("parameters", parts),
    ]


def _memory(outlook: Outlook) -> list[tuple[str, str]]:
    memory = outlook.memory
    parts = ", ".join(f"{name} {byte_size(count)}" for name, count in memory.parts.items() if count)
    phases = ", ".join(f"{name} {byte_size(count)}" for name, count in memory.phases.items())
    capacity = byte_size(outlook.capacity)
    peak = f"{byte_size(memory.peak)} at the peak ({memory.peak_phase}) of {capacity}"
    if memory.host:
        peak += f"; {byte_size(memory.host)} of the machine's at a checkpoint"
    return [("memory", peak), ("memory", parts), ("memory", phases)]


def _compute(outlook: Outlook) -> list[tuple[str, str]]:
    workload = outlook.workload
    per_token = short_number(outlook.flops_per_token)
    per_step = f"{outlook.flops_per_step:.3g} FLOPs a step ({per_token} a token)"
    if outlook.flops is None:
        return [("compute", f"{per_step}; nothing says how many steps")]
    assert workload.steps is not None
    total = f"{outlook.flops:.3g} FLOPs, {outlook.flops / PF_DAY:.3g} PF-days: "
    total += f"{counted(workload.steps, 'step')} of {short_number(workload.tokens_per_step)} tokens"
    rows = [("compute", total), ("compute", per_step)]
    if outlook.seconds is None or outlook.tokens_per_second is None:
        rows.append(("time", "not known: give --tflops or --tokens-per-second, or --measure"))
        return rows
    origin = "given"
    if outlook.rate is not None:
        origin = f"{outlook.rate.flops / 1e12:.3g} TFLOP/s a device, {outlook.rate.origin}"
    speed = f"{short_number(outlook.tokens_per_second)} tokens/s ({origin})"
    without = "without evaluation"
    if workload.evaluation is not None:
        without += f", {100 * workload.evaluation.evaluation_share:.2g} % of the tokens"
    rows.append(("time", f"{duration(outlook.seconds)} at {speed}, {without}"))
    return rows


def _tokens(outlook: Outlook) -> list[tuple[str, str]]:
    if outlook.workload.stage != "pretrain":
        return []
    names = {
        "besiroglu_2024": "Besiroglu et al., 2024",
        "hoffmann_2022": "Hoffmann et al., 2022",
        "kaplan_2020": "Kaplan et al., 2020",
    }
    laws = scaling_laws(outlook.workload)
    rows = []
    for key, name in names.items():
        law = laws[key]
        text = f"{short_number(law['best_tokens'])} tokens are best, loss {law['loss_at_best']:.3f}"
        if law["loss"] is not None:
            text += f"; this run's {short_number(outlook.workload.tokens or 0)}: {law['loss']:.3f}"
        rows.append(("tokens", f"{text} ({name})"))
    return rows


def _sharding(outlook: Outlook) -> list[tuple[str, str]]:
    rows = [
        (
            "sharding",
            f"{option.name}: {byte_size(option.bytes)} a device, "
            + ("fits" if option.fits else "does not fit"),
        )
        for option in outlook.sharding
    ]
    if outlook.fitting is None:
        text = "nothing makes it fit: more devices or memory, shorter sequences, a smaller model"
    else:
        text = outlook.fitting.flags or "as they are"
    return [*rows, ("flags", text)]

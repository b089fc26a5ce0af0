"""All that is known of a run before it runs, as one object and as a block of text.

In: a `Work`. Out: an `Outlook`.
"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TextIO

import torch
from rich.filesize import decimal

from llmctl import hardware
from llmctl.config.sections import Resumable
from llmctl.console import duration, log, rank, short, show_recipes
from llmctl.planning import compute
from llmctl.planning.compute import PF_DAY, Rate, flops_per_step, flops_per_token, rate_of
from llmctl.planning.memory import Memory, cache_bytes, memory_of
from llmctl.planning.placement import Choice, Placing, bytes_per_parameter, choose, placings
from llmctl.planning.work import Work

WIDTH = 12
"""Of the first column."""


@dataclass(frozen=True)
class Outlook:
    """What a run takes, and what may come of it."""

    work: Work
    memory: Memory
    flops_per_token: float
    flops_per_step: float
    rate: Rate | None
    tokens_per_second: float | None
    """Over all devices, as was given or follows from the rate."""
    capacity: float
    """Bytes of a device."""
    placings: list[Placing]
    choice: Choice | None
    notes: tuple[str, ...] = ()

    @property
    def flops(self) -> float | None:
        """Of the whole run."""
        steps = self.work.steps
        return None if steps is None else steps * self.flops_per_step

    @property
    def seconds(self) -> float | None:
        """Of training at the rate, without evaluation and saving."""
        if self.work.tokens is None or self.tokens_per_second is None:
            return None
        return self.work.tokens / self.tokens_per_second

    def as_json(self) -> dict[str, Any]:
        """Every number."""
        work, shape, memory = self.work, self.work.shape, self.memory
        return {
            "stage": work.stage,
            "device": work.device,
            "devices": work.world,
            "parameters": {
                **shape.parts,
                "total": shape.parameters,
                "active": shape.active,
                "trained": work.trained,
            },
            "run": {
                "steps": work.steps,
                "tokens": work.tokens,
                "tokens_per_step": work.tokens_per_step,
                "batch_size": work.batch_size,
                "grad_accum": work.grad_accum,
                "length": work.length,
                "precision": work.precision,
                "optimizer": work.optimizer,
            },
            "memory": {
                "parts": {name: round(size) for name, size in memory.parts.items()},
                "phases": {name: round(size) for name, size in memory.phases.items()},
                "peak": round(memory.peak),
                "peak_phase": memory.peak_phase,
                "host": round(memory.host),
                "bytes_per_parameter": bytes_per_parameter(work),
                "kv_cache_per_token": round(cache_bytes(work, 1, 1)),
                "device": round(self.capacity),
            },
            "compute": {
                "flops_per_token": self.flops_per_token,
                "flops_per_step": self.flops_per_step,
                "flops": self.flops,
                "pf_days": None if self.flops is None else self.flops / compute.PF_DAY,
                "rate": None if self.rate is None else asdict(self.rate),
                "tokens_per_second": self.tokens_per_second,
                "seconds": self.seconds,
            },
            "scaling": laws(work),
            "sharding": [asdict(placing) for placing in self.placings],
            "flags": None if self.choice is None else self.choice.flags,
            "notes": list(self.notes),
        }


def outlook(
    work: Work,
    config: Any,
    *,
    capacity: float | None = None,
    tflops: float | None = None,
    tokens_per_second: float | None = None,
    rate: Rate | None = None,
    notes: tuple[str, ...] = (),
) -> Outlook:
    """Work it all out.

    Args:
        work: to be done.
        config: of the model.
        capacity: bytes of a device; by default of this machine's.
        tflops: that a device reaches, in 10^12 a second.
        tokens_per_second: over all devices, where that is known instead.
        rate: that was measured.
        notes: what was assumed.
    """
    capacity = capacity or device_memory(work.device)
    per_step = flops_per_step(work, config)
    rate = rate or rate_of(work, tflops)
    speed = tokens_per_second
    if speed is None and rate is not None:
        speed = rate.flops * work.world * work.tokens_per_step / per_step
    return Outlook(
        work,
        memory_of(work),
        flops_per_token(work, config),
        per_step,
        rate,
        speed,
        capacity,
        placings(work, work.world, capacity),
        choose(work, work.world, capacity),
        notes,
    )


def device_memory(device: str) -> float:
    """Bytes of a GPU here, else of this machine that its cgroups grant."""
    if device == "cuda" and torch.cuda.is_available():
        return float(torch.cuda.mem_get_info()[1])
    return float(hardware.memory_total())


def laws(work: Work) -> dict[str, Any]:
    """What scaling laws say of this model and of these tokens; the best tokens where none is told.

    They are of pretraining, and of models that meet all their parameters.
    """
    parameters = work.shape.active
    inner = max(1, parameters - work.shape.parts["embedding"] - work.shape.parts["head"])
    found: dict[str, Any] = {
        "hoffmann_2022": _law(compute.HOFFMANN, parameters, work),
        "besiroglu_2024": _law(compute.BESIROGLU, parameters, work),
    }
    best = compute.kaplan_tokens(inner)
    tokens = work.tokens if work.stage == "pretrain" else None
    found["kaplan_2020"] = {
        "best_tokens": best,
        "loss_at_best": compute.kaplan_loss(inner, best),
        "loss": None if tokens is None else compute.kaplan_loss(inner, tokens),
    }
    return found


def _law(law: compute.Parametric, parameters: int, work: Work) -> dict[str, Any]:
    best = law.best_tokens(parameters)
    tokens = work.tokens if work.stage == "pretrain" else None
    return {
        "best_tokens": best,
        "loss_at_best": law.loss(parameters, best),
        "loss": None if tokens is None else law.loss(parameters, tokens),
    }


def lines(found: Outlook) -> list[str]:
    """The block, a line each: what it is about, then the facts."""
    rows = [
        *_parameters(found),
        *_memory(found),
        *_compute(found),
        *_tokens(found),
        *_placing(found),
        *(("note", note) for note in found.notes),
    ]
    shown, last = [], ""
    for name, text in rows:
        shown.append(f"{'' if name == last else name:<{WIDTH}}{text}")
        last = name
    return shown


def show(block: Sequence[str], stream: TextIO) -> None:
    """Print a block, its first column in bold on a terminal."""
    if not stream.isatty():
        print("\n".join(block), file=stream)
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(file=stream, highlight=False)
    for line in block:
        text = Text(line)
        text.stylize("bold cyan", 0, WIDTH)
        console.print(text, soft_wrap=True)


def show_dry_run(stage: str, config: Resumable, found: Outlook) -> dict[str, Any] | None:
    """The recipe on stdout, the block on stderr; with --json both in one object, the result."""
    if log.isEnabledFor(logging.INFO) and rank() == 0:
        show(lines(found), sys.stderr)
    return show_recipes([(stage, config)], found.as_json(), as_json=config.as_json)


def size(count: float) -> str:
    """Bytes as people say them."""
    return decimal(round(count)).replace(" bytes", " B")


def _parameters(found: Outlook) -> list[tuple[str, str]]:
    work, shape = found.work, found.work.shape
    parts = ", ".join(f"{name} {short(count)}" for name, count in shape.parts.items() if count)
    train = f"{work.trained:,} train" if work.trained != shape.parameters else "all train"
    mixture = f", {shape.active:,} for a token" if shape.active != shape.parameters else ""
    return [
        ("plan", f"{work.stage} of {shape.kind}, {work.precision} on {_devices(found)}"),
        ("parameters", f"{shape.parameters:,}{mixture}, {train}"),
        ("parameters", parts),
    ]


def _devices(found: Outlook) -> str:
    work = found.work
    return f"{work.world} x {work.device}" if work.world > 1 else work.device


def _memory(found: Outlook) -> list[tuple[str, str]]:
    memory = found.memory
    parts = ", ".join(f"{name} {size(count)}" for name, count in memory.parts.items() if count)
    phases = ", ".join(f"{name} {size(count)}" for name, count in memory.phases.items())
    peak = f"{size(memory.peak)} at the peak ({memory.peak_phase}) of {size(found.capacity)}"
    if memory.host:
        peak += f"; {size(memory.host)} of the machine's at a checkpoint"
    return [("memory", peak), ("memory", parts), ("memory", phases)]


def _compute(found: Outlook) -> list[tuple[str, str]]:
    work = found.work
    per_step = f"{found.flops_per_step:.3g} FLOPs a step ({short(found.flops_per_token)} a token)"
    if found.flops is None:
        return [("compute", f"{per_step}; nothing says how many steps")]
    total = f"{found.flops:.3g} FLOPs, {found.flops / PF_DAY:.3g} PF-days: "
    total += f"{work.steps:,} steps of {short(work.tokens_per_step)} tokens"
    rows = [("compute", total), ("compute", per_step)]
    if found.seconds is None or found.tokens_per_second is None:
        rows.append(("time", "not known: give --tflops or --tokens-per-second, or --measure"))
        return rows
    origin = "given"
    if found.rate is not None:
        origin = f"{found.rate.flops / 1e12:.3g} TFLOP/s a device, {found.rate.origin}"
    speed = f"{short(found.tokens_per_second)} tokens/s ({origin})"
    rows.append(("time", f"{duration(found.seconds)} at {speed}, without evaluation"))
    return rows


def _tokens(found: Outlook) -> list[tuple[str, str]]:
    if found.work.stage != "pretrain":
        return []
    names = {
        "besiroglu_2024": "Besiroglu et al., 2024",
        "hoffmann_2022": "Hoffmann et al., 2022",
        "kaplan_2020": "Kaplan et al., 2020",
    }
    said = laws(found.work)
    rows = []
    for key, name in names.items():
        law = said[key]
        text = f"{short(law['best_tokens'])} tokens are best, loss {law['loss_at_best']:.3f}"
        if law["loss"] is not None:
            text += f"; this run's {short(found.work.tokens or 0)}: {law['loss']:.3f}"
        rows.append(("tokens", f"{text} ({name})"))
    return rows


def _placing(found: Outlook) -> list[tuple[str, str]]:
    rows = [
        (
            "sharding",
            f"{placing.name}: {size(placing.bytes)} a device, "
            + ("fits" if placing.fits else "does not fit"),
        )
        for placing in found.placings
    ]
    if found.choice is None:
        text = "nothing makes it fit: more devices or memory, shorter sequences, a smaller model"
    else:
        text = found.choice.flags or "as they are"
    return [*rows, ("flags", text)]

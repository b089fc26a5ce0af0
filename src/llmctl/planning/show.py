"""An `Outlook` as a block of text."""

import logging
import sys
from collections.abc import Sequence
from typing import Any, TextIO

from rich.filesize import decimal

from llmctl.config.sections import Resumable
from llmctl.console import duration, log, rank, short
from llmctl.dryrun import show_recipes
from llmctl.planning.outlook import Outlook, laws
from llmctl.planning.scaling import PF_DAY

WIDTH = 12
"""Of the first column."""


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

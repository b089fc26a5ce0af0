"""`llmctl runs`: a table of runs, for people on a terminal, for scripts in a pipe or as JSON."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmctl.config.commands.runs import RunsConfig
from llmctl.console import log
from llmctl.errors import DataError
from llmctl.numbers import byte_size, duration
from llmctl.redact import redact
from llmctl.runs.listing import RunSummary, list_runs

COLUMNS = ("run", "stage", "status", "step", "loss", "age", "size")
COLORS = {
    "completed": "green",
    "running": "cyan",
    "preempted": "yellow",
    "killed": "yellow",
    "failed": "red",
    "diverged": "red",
    "damaged": "red",
}


def run(config: RunsConfig) -> dict[str, Any] | None:
    """Print the runs under the directory; with --json they are the result."""
    root = config.directory or Path("runs" if Path("runs").is_dir() else ".")
    if not root.exists():
        raise DataError("no such directory", file=root)
    if not root.is_dir():
        raise DataError("not a directory", file=root)
    summaries = list_runs(root)
    if not summaries:
        log.info("no runs under %s", root)
    if config.as_json:
        return {"stage": "runs", "runs": [asdict(summary) for summary in summaries]}
    if summaries:
        _print_table(summaries) if sys.stdout.isatty() else _print_columns(summaries)
    return None


def _print_table(summaries: list[RunSummary]) -> None:
    """For eyes: resume commands, which would not fit, stand below."""
    from rich.console import Console  # a third of the time that the command takes in a pipe
    from rich.table import Table
    from rich.text import Text

    console = Console(file=sys.stdout, highlight=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in COLUMNS:
        right = name in ("step", "loss", "age", "size")
        table.add_column(
            name,
            justify="right" if right else "left",
            overflow="fold",
            no_wrap=name != "run",
        )
    for summary in summaries:
        path, stage, status, *rest = _cells(summary)
        color = COLORS.get(status, "default")
        table.add_row(Text(path), stage, Text(status, style=color), *rest)
    console.print(table)
    commands = [_printable(summary.resume) for summary in summaries if summary.resume]
    if commands:
        console.print("\nto resume:")
    for command in commands:
        console.print(Text(f"  {command}"), soft_wrap=True)


def _print_columns(summaries: list[RunSummary]) -> None:
    """For scripts and files: aligned, one line a run, the resume command last."""
    rows = [
        [*COLUMNS, "resume"],
        *([*_cells(summary), _printable(summary.resume or "-")] for summary in summaries),
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    for row in rows:
        aligned = (cell.ljust(width) for cell, width in zip(row, widths, strict=False))
        print("  ".join([*aligned, row[-1]]).rstrip())


def _cells(summary: RunSummary) -> list[str]:
    step = "-" if summary.step is None else f"{summary.step:,}"
    if summary.step is not None and summary.max_steps is not None:
        step += f"/{summary.max_steps:,}"
    loss = summary.val_loss if summary.val_loss is not None else summary.loss
    return [
        _printable(summary.path),
        _printable(summary.stage or "-"),
        _printable(summary.status),
        step,
        "-" if loss is None else f"{loss:.4g}",
        duration(summary.age_seconds),
        byte_size(summary.bytes),
    ]


def _printable(text: str) -> str:
    """The text without what a terminal would obey or could not show."""
    return "".join(c if c.isprintable() else "?" for c in redact(text))

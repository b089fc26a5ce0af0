"""Show a life cycle on stderr: one live table on a terminal, plain lines elsewhere.

The lines of the stages stand above the table, as they come.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from llmctl.console import is_terminal, log, progress_to
from llmctl.numbers import cell, duration
from llmctl.pipeline.gate_checks import GateResult
from llmctl.pipeline.references import Stage

SUMMARY = (
    *("val_loss", "perplexity", "exact", "accuracy", "val_accuracy", "val_win_rate", "val_kl"),
    *("bits_per_byte", "vocab_size", "val_tokens", "rows"),
)
"""Metrics that sum a stage up: the first three that its result has are shown."""
MARKS = {
    "waiting": (" ", "dim"),
    "left": ("-", "dim"),
    "running": ("▸", "cyan"),
    "completed": ("✓", "green"),
    "unchanged": ("=", "green"),
    "failed": ("✗", "red"),
    "preempted": ("‖", "yellow"),
}


@dataclass
class StageRow:
    """State of one stage."""

    name: str
    stage: str
    state: str = "waiting"
    seconds: float | None = None
    figures: str = ""
    gates: Sequence[GateResult] = ()


class StageView:
    """States of all stages, and the progress of the one that runs."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        """Show all stages as waiting."""
        self.rows = {stage.name: StageRow(stage.name, stage.stage) for stage in stages}
        self.current: str | None = None
        self.progress = ("", 0, 1, "")
        self.began = 0.0

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show the table while the body runs, where there is a terminal."""
        with ExitStack() as stack:
            if is_terminal() and log.isEnabledFor(logging.INFO):
                from rich.console import Console
                from rich.live import Live

                live = Live(
                    get_renderable=self.table,
                    console=Console(stderr=True),
                    refresh_per_second=4,
                    redirect_stdout=False,
                )
                stack.enter_context(live)
                stack.enter_context(progress_to(self._watch))
            yield

    def begin(self, name: str, how: str) -> None:
        """Show a stage as running."""
        place = list(self.rows).index(name) + 1
        row = self.rows[name]
        log.info("[%d/%d] %s (%s): %s", place, len(self.rows), name, row.stage, how)
        row.state, self.current, self.began = "running", name, time.monotonic()
        self.progress = ("", 0, 1, "")

    def end(
        self,
        name: str,
        state: str,
        result: Mapping[str, Any],
        gates: Sequence[GateResult] = (),
        seconds: float | None = None,
    ) -> None:
        """Show how a stage ended, or that it did not need to begin."""
        place = list(self.rows).index(name) + 1
        row = self.rows[name]
        row.state, row.seconds, row.gates = state, seconds, gates
        row.figures = _figures(result, gates)
        took = "" if seconds is None else f" in {duration(seconds)}"
        figures = f"  {row.figures}" if row.figures else ""
        log.info("[%d/%d] %s: %s%s%s", place, len(self.rows), name, state, took, figures)
        for gate in gates:
            held = "holds" if gate.holds else "does NOT hold"
            log.info("  gate %s: %s (%.4g)", gate.gate, held, gate.value)
        self.current = None

    def table(self) -> Any:
        """Return the stages as a table of rich's."""
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, show_header=False)
        for column in ("mark", "name", "stage", "time", "figures"):
            table.add_column(column, no_wrap=column != "figures", justify="left")
        for row in self.rows.values():
            mark, style = MARKS[row.state]
            seconds = time.monotonic() - self.began if row.name == self.current else row.seconds
            table.add_row(
                Text(mark, style=style),
                Text(row.name, style=style if row.state == "waiting" else "bold"),
                Text(row.stage if row.stage != row.name else "", style="dim"),
                Text("" if seconds is None else duration(seconds)),
                self._progress_cell() if row.name == self.current else Text(row.figures),
            )
        return table

    def _watch(self, title: str, done: int, total: int, text: str) -> None:
        self.progress = (title, done, total, text)

    def _progress_cell(self) -> Any:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        title, done, total, text = self.progress
        if not title:
            return Text("starting", style="dim")
        grid = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=total, completed=done, width=20)
        grid.add_row(bar, f"{done:,}/{total:,}", text)
        return grid


def show_gates(rows: Mapping[str, StageRow]) -> None:
    """Log every gate and whether it holds."""
    results = [(row.name, result) for row in rows.values() for result in row.gates]
    if not results:
        return
    width = max(len(f"{name}  {result.gate}") for name, result in results)
    log.info("gates:")
    for name, result in results:
        mark = "holds" if result.holds else "FAILS"
        log.info("  %s  %-10.4g %s", f"{name}  {result.gate}".ljust(width), result.value, mark)


def _figures(result: Mapping[str, Any], gates: Sequence[GateResult]) -> str:
    gated = {gate.gate.figure for gate in gates}
    named = [name for name in SUMMARY if isinstance(result.get(name), int | float)]
    shown = [name for name in named if name not in gated][:3]
    figures = [f"{name} {cell(result[name])}" for name in shown]
    return "  ".join([*(f"{v.gate.figure} {cell(v.value)}" for v in gates), *figures])

"""What a life cycle says on stderr: one live table on a terminal, plain lines elsewhere.

The lines of the stages stand above the table, as they come.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from llmctl.console import is_terminal, log, watched
from llmctl.numbers import duration
from llmctl.pipeline.gates import GateResult
from llmctl.pipeline.references import Stage

FIGURES = (
    *("val_loss", "perplexity", "exact", "accuracy", "val_accuracy", "val_win_rate", "val_kl"),
    *("bits_per_byte", "vocab_size", "val_tokens", "rows"),
)
"""Of a result, those that say how a stage went; the first three that it has are shown."""
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
class Row:
    """How one stage stands."""

    name: str
    stage: str
    state: str = "waiting"
    seconds: float | None = None
    figures: str = ""
    gate_results: Sequence[GateResult] = field(default_factory=tuple)


class View:
    """All stages, and what the one under way is doing."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        """Nothing has begun."""
        self.rows = {stage.name: Row(stage.name, stage.stage) for stage in stages}
        self.current: str | None = None
        self.progress = ("", 0, 1, "")
        self.began = 0.0

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Keep the table in sight during the body, where there is a terminal."""
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
                stack.enter_context(watched(self._watch))
            yield

    def begin(self, name: str, how: str) -> None:
        """A stage begins."""
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
        gate_results: Sequence[GateResult] = (),
        seconds: float | None = None,
    ) -> None:
        """A stage ended, or needed not to begin."""
        place = list(self.rows).index(name) + 1
        row = self.rows[name]
        row.state, row.seconds, row.gate_results = state, seconds, gate_results
        row.figures = _figures(result, gate_results)
        took = "" if seconds is None else f" in {duration(seconds)}"
        said = f"  {row.figures}" if row.figures else ""
        log.info("[%d/%d] %s: %s%s%s", place, len(self.rows), name, state, took, said)
        for gate_result in gate_results:
            held = "holds" if gate_result.holds else "does NOT hold"
            log.info("  gate %s: %s (%.4g)", gate_result.gate, held, gate_result.value)
        self.current = None

    def table(self) -> Any:
        """The stages as a table of rich's."""
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
                self._doing() if row.name == self.current else Text(row.figures),
            )
        return table

    def _watch(self, title: str, done: int, total: int, text: str) -> None:
        self.progress = (title, done, total, text)

    def _doing(self) -> Any:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        title, done, total, text = self.progress
        if not title:
            return Text("starting", style="dim")
        doing = Table.grid(padding=(0, 1))
        doing.add_row(
            ProgressBar(total=total, completed=done, width=20), f"{done:,}/{total:,}", text
        )
        return doing


def show_gates(rows: Mapping[str, Row]) -> None:
    """A table of every gate, as lines of the log."""
    found = [(row.name, gate_result) for row in rows.values() for gate_result in row.gate_results]
    if not found:
        return
    width = max(len(f"{name}  {gate_result.gate}") for name, gate_result in found)
    log.info("gates:")
    for name, gate_result in found:
        mark = "holds" if gate_result.holds else "FAILS"
        log.info(
            "  %s  %-10.4g %s", f"{name}  {gate_result.gate}".ljust(width), gate_result.value, mark
        )


def _figures(result: Mapping[str, Any], gate_results: Sequence[GateResult]) -> str:
    gated = {gate_result.gate.figure for gate_result in gate_results}
    named = [name for name in FIGURES if isinstance(result.get(name), int | float)]
    shown = [name for name in named if name not in gated][:3]
    figures = [f"{name} {_number(result[name])}" for name in shown]
    return "  ".join([*(f"{v.gate.figure} {_number(v.value)}" for v in gate_results), *figures])


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"

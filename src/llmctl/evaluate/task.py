"""The work of an evaluation on one model, in units that make a row each, and where the rows go.

Units are computed in chunks. A chunk is always the same units, so a run that was stopped within one
computes it again and gets the same rows; only those that are missing are appended.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from llmctl.console import ProgressBar
from llmctl.data.append_log import AppendLog, open_append_log
from llmctl.runs.directory import Run
from llmctl.runs.ownership import ROWS

Row = dict[str, Any]
BEGINS = b'{"side": "'
"""How every row begins."""


@dataclass(frozen=True)
class EvaluationTask:
    """Units to compute, in order."""

    units: int
    chunk: int
    """Units that are computed together."""
    compute: Callable[[range], Sequence[Row]]
    """The rows of some units that follow each other."""


class RowsInMemory:
    """An `AppendLog` without a file."""

    def __init__(self) -> None:
        """Start without rows."""
        self.rows: list[Row] = []

    def append(self, row: Row) -> None:
        """See `AppendLog.append`."""
        self.rows.append(row)


RowLog = AppendLog | RowsInMemory
"""Rows in the order in which they were appended."""


def open_row_log(run: Run | None) -> AbstractContextManager[RowLog]:
    """Open the rows.jsonl of a run, with the rows that an earlier call wrote; else a list."""
    if run is None:
        return nullcontext(RowsInMemory())
    return open_append_log(run.path / ROWS, _check_row, BEGINS)


def run_task(task: EvaluationTask, side: str, rows: RowLog, title: str) -> list[Row]:
    """Compute the missing rows of a side (`model` or `compare`), and return all of them."""
    done = sum(row["side"] == side for row in rows.rows)
    with ProgressBar(title, task.units, "row") as progress:
        progress.start_at(done)
        for start in range(done - done % task.chunk, task.units, task.chunk):
            chunk = range(start, min(start + task.chunk, task.units))
            for number, row in zip(chunk, task.compute(chunk), strict=True):
                if number >= done:
                    rows.append({"side": side, "row": number, **row})
            progress.update(chunk.stop)
    return [row for row in rows.rows if row["side"] == side]


def _check_row(row: Row) -> str | None:
    return None if isinstance(row.get("side"), str) else "holds a row that is not of an evaluation"

"""What is to be done on one model, in units that make a row each and chunks that are done at once.

A chunk is always the same units, so a run that was stopped within one does it again and gets the
same rows; only those that are missing are added.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llmctl.console import ProgressBar
from llmctl.evaluate.output import Row, Rows


@dataclass(frozen=True)
class Work:
    """Units to do, in order."""

    units: int
    chunk: int
    """Units that are computed together."""
    compute: Callable[[range], Sequence[Row]]
    """The rows of some units that follow each other."""


def carry_out(work: Work, side: str, rows: Rows, title: str) -> list[dict[str, Any]]:
    """All rows of a side, those that were there and those that were missing.

    Args:
        work: what to do.
        side: whose rows these are, as the rows say it.
        rows: gets them.
        title: of the progress.
    """
    done = sum(row["side"] == side for row in rows.rows)
    with ProgressBar(title, work.units, "row") as progress:
        progress.start_at(done)
        for start in range(done - done % work.chunk, work.units, work.chunk):
            chunk = range(start, min(start + work.chunk, work.units))
            for number, row in zip(chunk, work.compute(chunk), strict=True):
                if number >= done:
                    rows.append({"side": side, "row": number, **row})
            progress.update(chunk.stop)
    return [row for row in rows.rows if row["side"] == side]

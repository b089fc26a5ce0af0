"""Where rows go as they come: to rows.jsonl of a run, or nowhere but to the figures."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from llmctl.data.append_log import open_journal
from llmctl.runs.directory import Run
from llmctl.runs.ownership import ROWS

Row = dict[str, Any]
BEGINS = b'{"side": "'
"""How every row begins."""


class Rows(Protocol):
    """Rows in the order in which they were added."""

    rows: list[Row]

    def append(self, row: Row) -> None:
        """Add a row; where there is a file, it is on the disk afterwards."""
        ...


class Held:
    """Rows in memory alone."""

    def __init__(self) -> None:
        """There are none yet."""
        self.rows: list[Row] = []

    def append(self, row: Row) -> None:
        """See `Rows.append`."""
        self.rows.append(row)


@contextmanager
def open_rows(run: Run | None) -> Iterator[Rows]:
    """The rows of a run, with those that an earlier call wrote."""
    if run is None:
        yield Held()
        return
    with open_journal(run.path / ROWS, _check, BEGINS) as journal:
        yield journal


def _check(row: Row) -> str | None:
    return None if isinstance(row.get("side"), str) else "holds a row that is not of an evaluation"

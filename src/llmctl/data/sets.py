"""Read every row that `--data` names, each file once, and make checked items of each.

In: names with or without weights, the layouts that rows may have, a function from a row to items.
Out: `ItemSet` objects, one for each name.
"""

import json
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Generic, TypeVar

from llmctl.console import log
from llmctl.data.bad_rows import BadRows
from llmctl.data.rows import SourceRow, read_rows
from llmctl.data.schemas import Layout, match_layout
from llmctl.data.sources import Source, find_sources, identity, manifest_input, split_weight
from llmctl.errors import DataError, UserError
from llmctl.numbers import counted

Item = TypeVar("Item")
Make = Callable[[SourceRow, Layout], Sequence[Item]]
"""Returns the items of a row, none where it has nothing to say; raises DataError for a bad row."""


@dataclass(frozen=True)
class ItemSet(Generic[Item]):
    """All items of one `--data`."""

    name: str
    weight: float | None
    """Its share of the mixture; None where no shares are given."""
    examples: list[Item]
    inputs: list[dict[str, Any]]
    """For the manifest."""


def read_sets(
    data: Sequence[str],
    layouts: tuple[Layout, ...],
    make: Make[Item],
    *,
    bad: BadRows | None = None,
    role: str = "data",
) -> list[ItemSet[Item]]:
    """Read every item that `data` names, in order, each file once.

    Arguments as `read_examples`; `make` returns the items of a row in one of the `layouts`.

    Raises:
        DataError: rows that are no items, with file and line, or none at all.
        NetworkError: a Hub data set that cannot be reached.
        UserError: weights that make no sense.
    """
    names, bad = _weights(data), BadRows() if bad is None else bad
    sets = []
    seen: set[str] = set()
    with tempfile.TemporaryDirectory(prefix="llmctl-") as spool:
        for name, weight in names:
            sources = [s for s in _sources(name, Path(spool)) if identity(s) not in seen]
            if not sources and weight is None:
                continue
            if not sources:
                raise UserError(f"--data {name}: named twice, so that its weight is in doubt")
            seen.update(map(identity, sources))
            items = [item for s in sources for item in _read(s, layouts, make, bad)]
            inputs = [manifest_input(role, s, partial(_rows_digest, s)) for s in sources]
            sets.append(ItemSet(name, weight, items, inputs))
    return sets


def _weights(data: Sequence[str]) -> list[tuple[str, float | None]]:
    """Split each name from the weight that it ends with; all have one, or none has."""
    named = [_weight(name) for name in data]
    lacking = [name for name, weight in named if weight is None]
    weighted = [name for name, weight in named if weight is not None]
    if lacking and weighted:
        raise UserError(
            f"--data {lacking[0]} has no weight, but {weighted[0]} has one",
            hint=f"give all of them one, as in --data {lacking[0]}=0.5, or none",
        )
    return named


def _weight(text: str) -> tuple[str, float | None]:
    name, weight = split_weight(text)
    if not weight:
        return name, None
    if not 0 < float(weight[1:]) < math.inf:
        raise UserError(f"--data {text}: the weight {weight[1:]} is not a positive number")
    return name, float(weight[1:])


def _sources(name: str, spool: Path) -> list[Source]:
    """Resolve a name, without plain text beside rows, such as a folder's README."""
    sources = find_sources([name], spool)
    rows = [source for source in sources if source.kind != "text"]
    if not rows:
        raise DataError(
            "plain text, which has no rows of examples",
            file=sources[0].name,
            hint="pass jsonl, json, csv, tsv, parquet or arrow; plain text is for llmctl pretrain",
        )
    if len(rows) < len(sources):
        texts = counted(len(sources) - len(rows), "file")
        log.info("%s: left out %s of plain text", name, texts)
    return rows


def _read(
    source: Source,
    layouts: tuple[Layout, ...],
    make: Make[Item],
    bad: BadRows,
) -> list[Item]:
    """Read the items of a source, all in the layout of its first row."""
    items: list[Item] = []
    known, first, is_empty = None, None, True

    def skip(error: DataError) -> None:
        nonlocal is_empty
        is_empty = False
        bad(error)

    for record in read_rows(source, on_bad=skip):
        is_empty = False
        try:
            layout = match_layout(record.values, layouts, known, first)
            record = record._replace(values=layout.flat(record.values))
            items.extend(make(record, layout))
        except DataError as error:
            error.file, error.line = record.place, record.line
            bad(error)
        else:
            known, first = layout, first or record.line
            bad.note_unread(layout.unread(record.values))
    if known is None:
        what = "an empty file: no rows in it" if is_empty else "no row of it can be read"
        raise DataError(what, file=source.name)
    return items


def _rows_digest(source: Source) -> str:
    """Hash the rows of a source."""
    rows = [record.values for record in read_rows(source)]
    return sha256(json.dumps(rows, default=str).encode()).hexdigest()  # a time is no JSON

"""Read every row that `--data` names, each file once, and make something checked of each.

In: names with or without weights, the layouts that rows may have, and what makes items of a row.
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
from llmctl.data.rows import Record, read_records
from llmctl.data.schemas import Layout, match_layout
from llmctl.data.sources import Source, find_sources, manifest_input
from llmctl.errors import DataError, UserError

Item = TypeVar("Item")
Make = Callable[[Record, Layout], Sequence[Item]]
"""The items of a row, none where it is sound and says nothing; raises DataError where it is not."""


@dataclass(frozen=True)
class ItemSet(Generic[Item]):
    """All items of one `--data`."""

    name: str
    weight: float | None
    """Its share of the mixture, where shares were given."""
    examples: list[Item]
    skipped: list[str]
    """What was wrong with each row that was left out."""
    inputs: list[dict[str, Any]]
    """For the manifest."""


def read_sets(
    data: Sequence[str],
    layouts: tuple[Layout, ...],
    make: Make[Item],
    *,
    skip_bad_rows: int = 0,
    role: str = "data",
) -> list[ItemSet[Item]]:
    """Every item that `data` names, in order, each file once.

    Args:
        data: files, folders, globs, Hub ids or built-in data, each with `=WEIGHT` or none.
        layouts: what a row may be.
        make: makes items of a row.
        skip_bad_rows: how many rows, of all sources, may be left out for their errors.
        role: what the manifest calls these inputs.

    Raises:
        DataError: rows that are no items, with file and line, or none at all.
        NetworkError: a Hub data set that cannot be reached.
        UserError: weights that make no sense.
    """
    names = _weights(data)
    bad: list[DataError] = []

    def tolerate(error: DataError) -> None:
        bad.append(error)
        if len(bad) > skip_bad_rows:
            if skip_bad_rows:
                error.message += f" ({len(bad):,} bad rows, --skip-bad-rows {skip_bad_rows:,})"
            raise error

    sets = []
    seen: set[str] = set()
    with tempfile.TemporaryDirectory(prefix="llmctl-") as spool:
        for name, weight in names:
            sources = [s for s in _sources(name, Path(spool)) if _identity(s) not in seen]
            if not sources and weight is None:
                continue
            if not sources:
                raise UserError(f"--data {name}: named twice, so that its weight is in doubt")
            seen.update(map(_identity, sources))
            before = len(bad)
            items = [item for s in sources for item in _read(s, layouts, make, tolerate)]
            inputs = [manifest_input(role, s, partial(_rows_digest, s)) for s in sources]
            skipped = [str(error).splitlines()[0] for error in bad[before:]]
            sets.append(ItemSet(name, weight, items, skipped, inputs))
    if bad:
        first = str(bad[0]).splitlines()[0]
        log.warning("left out %s rows that cannot be read, the first: %s", f"{len(bad):,}", first)
    return sets


def _weights(data: Sequence[str]) -> list[tuple[str, float | None]]:
    """Each name, and the weight that it ends with."""
    named = [_weight(name) for name in data]
    lacking = [name for name, weight in named if weight is None]
    given = [name for name, weight in named if weight is not None]
    if lacking and given:
        raise UserError(
            f"--data {lacking[0]} has no weight, but {given[0]} has one",
            hint=f"give all of them one, as in --data {lacking[0]}=0.5, or none",
        )
    return named


def _weight(name: str) -> tuple[str, float | None]:
    stem, sign, number = name.rpartition("=")
    if not sign or Path(name).expanduser().exists():
        return name, None
    try:
        weight = float(number)
    except ValueError:
        return name, None
    if not 0 < weight < math.inf:
        raise UserError(f"--data {name}: the weight {number} is not a positive number")
    return stem, weight


def _sources(name: str, spool: Path) -> list[Source]:
    """What a name stands for; plain text beside rows, such as a folder's README, is left out."""
    found = find_sources([name], spool)
    rows = [source for source in found if source.kind != "text"]
    if not rows:
        raise DataError(
            "plain text, which has no rows of examples",
            file=found[0].name,
            hint="pass jsonl, json, csv or parquet; plain text is for llmctl pretrain",
        )
    if len(rows) < len(found):
        log.info("%s: left out %d files of plain text", name, len(found) - len(rows))
    return rows


def _read(
    source: Source,
    layouts: tuple[Layout, ...],
    make: Make[Item],
    tolerate: Callable[[DataError], None],
) -> list[Item]:
    """The items of a source, all in the layout of its first row."""
    items: list[Item] = []
    layout, first, is_empty = None, None, True

    def skip(error: DataError) -> None:
        nonlocal is_empty
        is_empty = False
        tolerate(error)

    for record in read_records(source, on_bad=skip):
        is_empty = False
        try:
            found = match_layout(record.row, layouts, layout, first)
            items.extend(make(record, found))
        except DataError as error:
            error.file, error.line = record.place, record.line
            tolerate(error)
        else:
            layout, first = found, first or record.line
    if layout is None:
        what = "an empty file: no rows in it" if is_empty else "no row of it can be read"
        raise DataError(what, file=source.name)
    return items


def _identity(source: Source) -> str:
    """What tells a source from all others, however it is spelled."""
    return source.name if source.path is None else str(source.path.resolve())


def _rows_digest(source: Source) -> str:
    """Hex sha256 of the rows of a source."""
    return sha256(json.dumps([record.row for record in read_records(source)]).encode()).hexdigest()

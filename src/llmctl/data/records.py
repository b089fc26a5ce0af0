"""Read rows from a source, strictly, whatever form it has.

In: a `Source`. Out: `Record` objects, each with the file and the line it begins in. Whatever is not
UTF-8, not JSON, not CSV or not an object is a DataError that names them.
"""

import csv
import gzip
import io
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any, NamedTuple

from llmctl.data import builtin, courtesy, tasks
from llmctl.data.hub import split_revision
from llmctl.data.lines import LINE_BYTES, json_type, not_utf8, parse_array, parse_row, read_lines
from llmctl.data.sources import Source
from llmctl.errors import DataError, NetworkError

BLOCK_BYTES = 1 << 20
ARRAY_BYTES = 1 << 30
"""Largest JSON array, which is held in memory whole; objects on lines of their own are not."""

OPENING_BYTES = 1 << 12
"""Where a file shows whether it is an array."""

OnBad = Callable[[DataError], None]


class Record(NamedTuple):
    """One row."""

    row: dict[str, Any]
    place: str
    """The file, or the name of the source."""
    line: int | None
    """1-based line that it begins in; its number where rows are not lines."""


def read_records(
    source: Source, columns: Sequence[str] | None = None, on_bad: OnBad | None = None
) -> Iterator[Record]:
    """The rows of a source in order.

    Args:
        source: what to read.
        columns: the only ones that are wanted; refused where a header does not name them.
        on_bad: gets the error of a row that cannot be read, where reading can go on after it.

    Raises:
        DataError: rows that are damaged, or a source that holds none but text.
        NetworkError: a Hub data set that cannot be reached.
    """
    skip = on_bad or _refuse
    if source.kind == "jsonl":
        return _jsonl(source, skip)
    if source.kind == "json":
        return _json(source, skip)
    if source.kind == "csv":
        return _csv(source, columns, skip)
    if source.kind == "parquet":
        return _parquet(source, columns)
    if source.kind == "hub":
        return _hub(source)
    if source.kind == "builtin":
        return _builtin(source.name)
    raise DataError(
        "plain text has no rows",
        file=source.name,
        hint="pass jsonl, json, csv or parquet",
    )


@contextmanager
def opened(source: Source) -> Iterator[IO[bytes]]:
    """The bytes of a file, unpacked; a packed file that is cut short or damaged is an error."""
    assert source.path is not None
    suffix = source.path.suffix.lower()
    try:
        if suffix == ".gz":
            with gzip.open(source.path) as packed:
                yield io.BufferedReader(packed, BLOCK_BYTES)
        elif suffix == ".zst":
            import pyarrow as pa  # zstandard's own reader takes a truncated file for a whole one

            with pa.input_stream(str(source.path), compression="zstd") as stream:
                yield io.BufferedReader(stream, BLOCK_BYTES)
        else:
            with source.path.open("rb", buffering=BLOCK_BYTES) as file:
                yield file
    except (EOFError, zlib.error, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        what = "damaged" if suffix in (".gz", ".zst") else "cannot be read"
        raise DataError(f"{what}: {reason}", file=source.name) from None


def checked_text(value: Any, name: str, place: str | None = None, line: int | None = None) -> str:
    """The value, which must be text that UTF-8 can hold; errors call it `name`."""
    if not isinstance(value, str):
        raise DataError(f"`{name}` is {json_type(value)}, expected text", file=place, line=line)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            code = ord(value[error.start])
            raise DataError(
                f"`{name}` has half a surrogate pair, \\u{code:04x}, which is no character",
                file=place,
                line=line,
            ) from None
    return value


def listed(names: Sequence[str]) -> str:
    """Columns as a message names them."""
    return ", ".join(f"`{name}`" for name in names[:20]) or "none"


def no_column(name: str, there: Sequence[str], place: str, line: int | None) -> DataError:
    """The error for a document without its text."""
    return DataError(
        f"no column `{name}`; there is {listed(there)}",
        file=place,
        line=line,
        hint="name the column that holds the text: --text-column NAME",
    )


def _refuse(error: DataError) -> None:
    raise error


def _jsonl(source: Source, skip: OnBad, hint: str | None = None) -> Iterator[Record]:
    with opened(source) as file:
        for number, line in read_lines(file, source.name):
            if not line.strip():
                continue
            try:
                row = parse_row(line, source.name, number)
            except DataError as error:
                error.hint = hint or error.hint
                skip(error)
            else:
                yield Record(row, source.name, number)


def _json(source: Source, skip: OnBad) -> Iterator[Record]:
    """An array of objects, or objects on lines of their own."""
    with opened(source) as file:
        opening = file.read(OPENING_BYTES).removeprefix("\ufeff".encode()).lstrip()
    if opening[:1] != b"[":
        hint = "a .json file holds an array of objects, or one object a line"
        yield from _jsonl(source, skip, hint)
        return
    with opened(source) as file:
        raw = file.read(ARRAY_BYTES + 1)
    if len(raw) > ARRAY_BYTES:
        what = f"an array of more than {ARRAY_BYTES >> 20:,} MiB, the limit"
        raise DataError(what, file=source.name, hint="save it as .jsonl: one object a line")
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        not_utf8(source.name, error.start, raw[:2])
    del raw
    for line, row in parse_array(text, source.name):
        if isinstance(row, dict):
            yield Record(row, source.name, line)
        else:
            what = f"expected an object, got {json_type(row)}"
            skip(DataError(what, file=source.name, line=line))


def _csv(source: Source, columns: Sequence[str] | None, skip: OnBad) -> Iterator[Record]:
    csv.field_size_limit(LINE_BYTES)
    header: list[str] = []
    with opened(source) as file:
        rows = csv.reader((line for _, line in read_lines(file, source.name)), strict=True)
        while True:
            line = rows.line_num + 1
            try:
                row = next(rows, None)
            except csv.Error as error:
                bad = DataError(f"not CSV: {error}", file=source.name, line=line)
                (skip if header else _refuse)(bad)
                continue
            if row is None:
                return
            if not header:
                header = row
                named = [name for name in header if name]
                _check_names(named, columns if header else None, source.name, line)
            elif len(row) == len(header):
                yield Record(dict(zip(header, row, strict=True)), source.name, line)
            elif row:
                what = f"{len(row)} fields, but the header has {len(header)}"
                skip(DataError(what, file=source.name, line=line))


def _check_names(
    names: Sequence[str], wanted: Sequence[str] | None, place: str, line: int | None
) -> None:
    """Refuse a header that lacks a column, or names two alike, of which a row would keep one."""
    for name in wanted or ():
        if name not in names:
            raise no_column(name, names, place, line)
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(f"two columns are named `{twice[0]}`", file=place, line=line)


def _parquet(source: Source, columns: Sequence[str] | None) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with tempfile.TemporaryFile() as unpacked:
        path: Any = source.path
        if source.path is not None and source.path.suffix.lower() in (".gz", ".zst"):
            with opened(source) as packed:
                shutil.copyfileobj(packed, unpacked)
            path = unpacked
        try:
            file = pq.ParquetFile(path, pre_buffer=False)
            _check_names(file.schema_arrow.names, columns, source.name, None)
            number = 0
            wanted = None if columns is None else list(columns)
            for batch in file.iter_batches(batch_size=1024, columns=wanted):
                for row in batch.to_pylist():
                    number += 1
                    yield Record(row, source.name, number)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(f"not a sound parquet file: {error}", file=source.name) from None


def _hub(source: Source) -> Iterator[Record]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    name = source.name
    try:
        repository, _ = split_revision(name)
        rows = load_dataset(repository, split="train", streaming=True, revision=source.revision)
        for number, row in enumerate(rows, start=1):
            yield Record(row, name, number)
    except ConnectionError as error:
        raise NetworkError(str(error), file=name, hint="try again, or pass a local file") from None
    except (DatasetNotFoundError, ValueError) as error:
        raise DataError(str(error).splitlines()[0], file=name) from None


def _builtin(name: str) -> Iterator[Record]:
    rows: Iterator[dict[str, Any]]
    if name.startswith(courtesy.PREFERENCES):
        rows = iter(courtesy.named(name))
    elif name.startswith(tasks.TASKS):
        rows = ({"messages": task.messages()} for task in tasks.named(name)[1])
    else:
        rows = ({"text": text} for text in builtin.python_docs())
    return (Record(row, name, number) for number, row in enumerate(rows, start=1))

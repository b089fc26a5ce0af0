"""Read rows strictly, whatever form a source has: jsonl, JSON, CSV, Arrow, Hub data, built-in.

In: a `Source`, or an open file and its name. Out: `SourceRow` objects, each with its file and first
line, or numbered lines and their objects. Whatever is not UTF-8, not JSON, not CSV or not an object
is a DataError that names them.
"""

import csv
import datetime
import decimal
import json
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from typing import IO, Any, NamedTuple, NoReturn

from llmctl.data import builtin
from llmctl.data.arrow import ArrowFile, plain_row
from llmctl.data.kinds import LINE_BYTES, open_file
from llmctl.data.sources import Source
from llmctl.errors import DataError, NetworkError
from llmctl.models.hub import split_revision

BYTE_ORDER_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}

_NOT_SPACE = re.compile(r"[^ \t\n\r]")

ARRAY_BYTES = 1 << 30
"""Largest JSON array, which is held in memory whole, unlike objects on lines of their own."""

OPENING_BYTES = 1 << 12
"""Bytes that show whether a file is an array."""

LINES_OR_ARRAY = "expected an array of objects, or one object a line"

OnBad = Callable[[DataError], None]

TYPES: dict[type | tuple[type, ...], str] = {  # the first that fits
    str: "text",
    list: "an array",
    dict: "an object",
    type(None): "null",
    bool: "true or false",
    (int, float): "a number",
    bytes: "bytes that are not UTF-8",
    datetime.datetime: "a timestamp",
    datetime.date: "a date",
    datetime.time: "a time of day",
    datetime.timedelta: "a duration",
    decimal.Decimal: "a decimal number",
}


def read_lines(file: IO[bytes], place: str) -> Iterator[tuple[int, str]]:
    """Yield 1-based number and text of each line, its end included, without a byte-order mark.

    Raises:
        DataError: a line that is not UTF-8, or is over the limit.
    """
    offset, head = 0, b""
    for number in range(1, 1 << 62):
        raw = file.readline(LINE_BYTES + 1)
        if not raw:
            return
        head = head or raw[:2]
        if len(raw) > LINE_BYTES:
            raise DataError(
                f"a line of more than {LINE_BYTES >> 20} MiB, the limit",
                file=place,
                line=number,
                hint="one line holds one document: split it, or save it as .txt",
            )
        try:
            line = raw.decode()
        except UnicodeDecodeError as error:
            not_utf8(place, offset + error.start, head)
        offset += len(raw)
        yield number, line.removeprefix("\ufeff") if number == 1 else line


def parse_row(line: str, place: str, number: int) -> dict[str, Any]:
    """Parse the object of a line of jsonl.

    Raises:
        DataError: not JSON, not an object, a key given twice, NaN or infinity.
    """
    try:
        row = DECODER.decode(line.rstrip())
    except (ValueError, RecursionError) as error:
        raise _not_json(error, place, number) from None
    if not isinstance(row, dict):
        raise DataError(
            f"expected an object, got {json_type(row)}",
            file=place,
            line=number,
            hint="jsonl has one object a line",
        )
    return row


def parse_array(text: str, place: str) -> Iterator[tuple[int, Any]]:
    """Yield 1-based line and value of each element of the JSON array in a text.

    Raises:
        DataError: not JSON, a key given twice, NaN or infinity; after the elements before it.
    """
    at, counted, line = _skip(text, text.index("[") + 1), 0, 1
    is_more = text[at : at + 1] != "]"
    while is_more:
        line += text.count("\n", counted, at)
        counted = at
        try:
            value, at = DECODER.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise _not_json(error, place, line) from None
        yield line, value
        at = _skip(text, at)
        is_more = text[at : at + 1] != "]"
        if is_more and text[at : at + 1] != ",":
            raise _not_json(json.JSONDecodeError("Expecting ',' delimiter", text, at), place, line)
        at = _skip(text, at + is_more)
    end = _skip(text, at + 1)
    if end < len(text):
        raise _not_json(json.JSONDecodeError("Extra data", text, end), place, line)


def not_utf8(place: str, offset: int, head: bytes) -> NoReturn:
    """Raise the error for bytes that are no UTF-8.

    `offset` is 0-based; `head` is the file's first two bytes, perhaps a byte-order mark.
    """
    marked = BYTE_ORDER_MARKS.get(head[:2])
    start = f"; it begins with a {marked} byte-order mark" if marked else ""
    raise DataError(
        f"not UTF-8 at byte {offset:,}{start}",
        file=place,
        hint=f"convert it: iconv -f {marked or 'ENCODING'} -t UTF-8 {place}",
    )


def json_type(value: Any) -> str:
    """Name a value's type, as JSON does where JSON has it."""
    other = f"of type {type(value).__name__}"
    return next((name for kind, name in TYPES.items() if isinstance(value, kind)), other)


def json_problem(text: str) -> str | None:
    """Say why a text cannot be read as JSON; None where it can."""
    try:
        DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        return _problem(error)
    return None


def _problem(error: ValueError | RecursionError) -> str:
    """Say what is wrong with text that cannot be read: some of it is JSON."""
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} at column {error.colno}"
    if isinstance(error, RecursionError):
        return "arrays or objects within each other, more than can be read"
    if str(error).startswith("Exceeds the limit"):
        return f"a number of more than {sys.get_int_max_str_digits():,} digits"
    return f"not JSON: {error}"


def _not_json(error: ValueError | RecursionError, place: str, line: int) -> DataError:
    """Build the error for text that cannot be read as JSON and begins in this line."""
    if isinstance(error, json.JSONDecodeError):
        line = max(line, error.lineno)
    return DataError(_problem(error), file=place, line=line)


def _skip(text: str, at: int) -> int:
    """Return the next offset that holds no white space."""
    match = _NOT_SPACE.search(text, at)
    return match.start() if match else len(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"duplicate key `{shown_name(twice)}`")
    return row


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


class SourceRow(NamedTuple):
    """One row and its place."""

    values: dict[str, Any]
    place: str
    """The file, or the name of the source."""
    line: int | None
    """1-based first line; the row's number where rows are not lines."""


def read_rows(
    source: Source, columns: Sequence[str] | None = None, on_bad: OnBad | None = None
) -> Iterator[SourceRow]:
    """Read the rows of a source in order.

    Only `columns`, if given; refused where a header lacks one. `on_bad` gets the error of a row
    that cannot be read, where reading can continue.

    Raises:
        DataError: damaged rows, or a source of plain text.
        NetworkError: a Hub data set that cannot be reached.
    """
    skip = on_bad or _refuse
    if source.kind == "jsonl":
        return _jsonl(source, skip)
    if source.kind == "json":
        return _json(source, skip)
    if source.kind in ("csv", "tsv"):
        return _csv(source, columns, skip)
    if source.kind in ("parquet", "arrow"):
        return _arrow(source, columns)
    if source.kind == "hub":
        return _hub(source)
    if source.kind == "builtin":
        return _builtin(source.name)
    raise DataError(
        "plain text has no rows",
        file=source.name,
        hint="pass jsonl, json, csv, tsv, parquet or arrow; a file of another suffix is rows where "
        "it begins as one of them does",
    )


def open_source(source: Source) -> AbstractContextManager[IO[bytes]]:
    """Open a file, decompressed; a compressed file that is cut short or damaged is an error."""
    assert source.path is not None
    return open_file(source.path, source.packing, source.name)


def checked_text(value: Any, name: str, place: str | None = None, line: int | None = None) -> str:
    """Return the value, which must be text that UTF-8 can hold; errors call it `name`."""
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


def said_columns(row: Mapping[str, Any], read: Set[str]) -> set[str]:
    """Return the columns of a row that say something, without those that are `read`."""
    return {name for name in row.keys() - read if row[name] not in (None, "", [], {})}


def arrow_columns(source: Source) -> list[str]:
    """Return the columns of a parquet or Arrow file, of which only some may be read; else none.

    Raises:
        DataError: it is damaged.
    """
    if source.kind not in ("parquet", "arrow"):
        return []
    with _seekable(source) as file:
        return ArrowFile(file, source.kind, source.name).columns


def quote_names(names: Sequence[str]) -> str:
    """List names of columns for a message."""
    return ", ".join(f"`{shown_name(name)}`" for name in names[:20]) or "none"


def shown_name(name: str) -> str:
    """Return the name of a column, in which half surrogate pairs are escaped."""
    return name.encode(errors="backslashreplace").decode()


def no_column(name: str, columns: Sequence[str], place: str, line: int | None) -> DataError:
    """Build the error for a document without the column of its text."""
    return DataError(
        f"no column `{name}`; there is {quote_names(columns)}",
        file=place,
        line=line,
        hint="name the column that holds the text: --text-column NAME",
    )


def _refuse(error: DataError) -> None:
    raise error


def _jsonl(source: Source, skip: OnBad) -> Iterator[SourceRow]:
    """Read objects on lines of their own."""
    is_first = True
    with open_source(source) as file:
        for number, line in read_lines(file, source.name):
            if not line.strip():
                continue
            try:
                row = parse_row(line, source.name, number)
            except DataError as error:
                if is_first and line.lstrip()[:1] == "{":
                    _refuse_spread(source, number)
                if source.kind == "json":
                    error.hint = error.hint or LINES_OR_ARRAY
                skip(error)
            else:
                yield SourceRow(row, source.name, number)
            is_first = False


def _refuse_spread(source: Source, number: int) -> None:
    """Refuse a file whose first object, begun in this line, is spread over several."""
    with open_source(source) as file:
        text = file.read(LINE_BYTES).decode(errors="replace").removeprefix("\ufeff")
    try:
        row, end = DECODER.raw_decode(text, _skip(text, 0))
    except (ValueError, RecursionError):
        return
    if "\n" not in text[:end].lstrip():
        return
    lists = {name: len(value) for name, value in row.items() if isinstance(value, list)}
    longest = max(lists, key=lists.__getitem__, default=None)
    inner = "" if longest is None else f"; its rows may be those of `{longest}`"
    raise DataError(
        f"one object over several lines{inner}",
        file=source.name,
        line=number,
        hint=LINES_OR_ARRAY,
    )


def _json(source: Source, skip: OnBad) -> Iterator[SourceRow]:
    """Read an array of objects, or objects on lines of their own."""
    with open_source(source) as file:
        opening = file.read(OPENING_BYTES).removeprefix("\ufeff".encode()).lstrip()
    if opening[:1] != b"[":
        yield from _jsonl(source, skip)
        return
    with open_source(source) as file:
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
            yield SourceRow(row, source.name, line)
        else:
            what = f"expected an object, got {json_type(row)}"
            skip(DataError(what, file=source.name, line=line))


def _csv(source: Source, columns: Sequence[str] | None, skip: OnBad) -> Iterator[SourceRow]:
    csv.field_size_limit(LINE_BYTES)
    header: list[str] = []
    with open_source(source) as file:
        lines = (line for _, line in read_lines(file, source.name))
        first = next(lines, "")
        rows = csv.reader(chain([first], lines), strict=True, delimiter=_delimiter(source, first))
        while True:
            line = rows.line_num + 1
            try:
                row = next(rows, None)
            except csv.Error as error:
                bad = _not_csv(error, source, line)
                (skip if header else _refuse)(bad)
                continue
            if row is None:
                return
            if not header:
                header = row
                named = [name for name in header if name]
                _check_names(named, columns if header else None, source.name, line)
            elif len(row) == len(header):
                yield SourceRow(dict(zip(header, row, strict=True)), source.name, line)
            elif row:
                what = f"{len(row)} fields, but the header has {len(header)}"
                skip(DataError(what, file=source.name, line=line))


def _not_csv(error: csv.Error, source: Source, line: int) -> DataError:
    """Build the error for a row of CSV that begins in this line."""
    what, hint = f"not {source.kind.upper()}: {error}", None
    if "new-line character" in str(error):
        what = "a carriage return without a line feed after it, in a field without quotation marks"
        hint = "of lines that end as on old Macs make others: tr '\\r' '\\n' < OLD > NEW"
    elif "unexpected end of data" in str(error):
        what = 'the quotation mark " that begins a field is not closed by the end of the file'
        hint = 'quote the field, and double each " in it: """So,"" he said"; or save it as .jsonl'
    return DataError(what, file=source.name, line=line, hint=hint)


def _delimiter(source: Source, header: str) -> str:
    """What stands between columns: a semicolon where spreadsheets use the comma in numbers."""
    if source.kind == "tsv":
        return "\t"
    return ";" if ";" in header and "," not in header else ","


def _check_names(
    names: Sequence[str], wanted: Sequence[str] | None, place: str, line: int | None
) -> None:
    """Refuse a header that lacks a column, or has a name twice: a row would keep only one."""
    for name in wanted or ():
        if name not in names:
            raise no_column(name, names, place, line)
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(f"two columns are named `{twice[0]}`", file=place, line=line)


def _arrow(source: Source, columns: Sequence[str] | None) -> Iterator[SourceRow]:
    """Read a parquet file, or the format in which `datasets` keeps rows."""
    with _seekable(source) as file:
        table = ArrowFile(file, source.kind, source.name)
        _check_names(table.columns, columns, source.name, None)
        for number, row in enumerate(table.rows(columns), start=1):
            yield SourceRow(row, source.name, number)


@contextmanager
def _seekable(source: Source) -> Iterator[Any]:
    """Give the path of a file, or its content unpacked."""
    if source.packing is None:
        yield str(source.path)
        return
    with tempfile.TemporaryFile() as unpacked:
        with open_source(source) as packed:
            shutil.copyfileobj(packed, unpacked)
        unpacked.seek(0)
        yield unpacked


def _hub(source: Source) -> Iterator[SourceRow]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    name = source.name
    try:
        repository, _ = split_revision(name)
        rows = load_dataset(repository, split="train", streaming=True, revision=source.revision)
        for number, row in enumerate(rows, start=1):
            yield SourceRow(plain_row(row, name, rows.features), name, number)
    except ConnectionError as error:
        raise NetworkError(str(error), file=name, hint="try again, or pass a local file") from None
    except (DatasetNotFoundError, ValueError) as error:
        raise DataError(str(error).splitlines()[0], file=name) from None


def _builtin(name: str) -> Iterator[SourceRow]:
    rows: Iterator[dict[str, Any]]
    if name.startswith(builtin.PREFERENCES):
        rows = iter(builtin.named_preferences(name))
    elif name.startswith(builtin.TASKS):
        rows = ({"messages": task.messages()} for task in builtin.named_tasks(name)[1])
    else:
        rows = ({"text": text} for text in builtin.python_docs())
    return (SourceRow(row, name, number) for number, row in enumerate(rows, start=1))

"""Read documents from a source, piece by piece, with strict checks.

In: a `Source`. Out: `Piece` objects. A plain text file is one document in many pieces; a line of
jsonl or a row is one document in one piece. Text is kept to the byte. Whatever is not UTF-8, not
JSON or not text is a DataError that names the file and the line or byte.
"""

import codecs
import csv
import gzip
import io
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any, NamedTuple

from llmctl.data import builtin
from llmctl.data.lines import LINE_BYTES, json_type, not_utf8, parse_row, read_lines
from llmctl.data.sources import Source
from llmctl.errors import DataError, NetworkError

BLOCK_BYTES = 1 << 20


class Piece(NamedTuple):
    """A stretch of one document."""

    text: str
    place: str
    """The file, or the name of the source."""
    line: int | None
    """1-based line or row; None where the file is the document."""
    is_last: bool


def read_pieces(source: Source, column: str) -> Iterator[Piece]:
    """The documents of a source in order, `column` naming the text of records.

    Raises:
        DataError: text that is damaged, missing, null or not UTF-8, with its file and line or byte.
        NetworkError: a Hub data set that cannot be reached.
    """
    if source.kind == "builtin":
        documents = builtin.python_docs()
        return (Piece(text, source.name, n, True) for n, text in enumerate(documents, start=1))
    if source.kind == "hub":
        return _hub(source, column)
    read: dict[str, Callable[[Source, str], Iterator[Piece]]] = {
        "text": _text,
        "jsonl": _jsonl,
        "csv": _csv,
        "parquet": _parquet,
    }
    return read[source.kind](source, column)


@contextmanager
def _opened(source: Source) -> Iterator[IO[bytes]]:
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


def _text(source: Source, column: str) -> Iterator[Piece]:
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    head, waiting, consumed = b"", "", 0
    with _opened(source) as file:
        while True:
            block = file.read(BLOCK_BYTES)
            head = head or block[:2]
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                not_utf8(source.name, consumed - pending + error.start, head)
            consumed += len(block)
            if waiting and (text or not block):
                yield Piece(waiting, source.name, None, not block)
                waiting = ""
            waiting = waiting + text
            if not block:
                return


def _lines(source: Source) -> Iterator[tuple[int, str]]:
    with _opened(source) as file:
        yield from read_lines(file, source.name)


def _jsonl(source: Source, column: str) -> Iterator[Piece]:
    for number, line in _lines(source):
        if not line.strip():
            continue
        row = parse_row(line, source.name, number)
        if column not in row:
            raise _no_column(source, number, column, list(row))
        yield Piece(_checked(row[column], source.name, number, column), source.name, number, True)


def _no_column(source: Source, line: int | None, column: str, there: list[str]) -> DataError:
    return DataError(
        f"no column `{column}`; there is {', '.join(f'`{name}`' for name in there[:20]) or 'none'}",
        file=source.name,
        line=line,
        hint="name the column that holds the text: --text-column NAME",
    )


def _checked(value: Any, place: str, line: int, column: str) -> str:
    """The value, which must be text that UTF-8 can hold."""
    if not isinstance(value, str):
        raise DataError(f"`{column}` is {json_type(value)}, expected text", file=place, line=line)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            code = ord(value[error.start])
            raise DataError(
                f"`{column}` has half a surrogate pair, \\u{code:04x}, which is no character",
                file=place,
                line=line,
            ) from None
    return value


def _csv(source: Source, column: str) -> Iterator[Piece]:
    csv.field_size_limit(LINE_BYTES)
    rows = csv.reader((line for _, line in _lines(source)), strict=True)
    index, width = None, 0
    try:
        for row in rows:
            line = rows.line_num
            if not row:
                continue
            if index is None:
                if column not in row:
                    raise _no_column(source, line, column, row)
                index, width = row.index(column), len(row)
                continue
            if len(row) != width:
                raise DataError(
                    f"{len(row)} fields, but the header has {width}", file=source.name, line=line
                )
            yield Piece(row[index], source.name, line, True)
    except csv.Error as error:
        raise DataError(f"not CSV: {error}", file=source.name, line=rows.line_num) from None


def _parquet(source: Source, column: str) -> Iterator[Piece]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with tempfile.TemporaryFile() as unpacked:
        path: Any = source.path
        if source.path is not None and source.path.suffix.lower() in (".gz", ".zst"):
            with _opened(source) as packed:
                shutil.copyfileobj(packed, unpacked)
            path = unpacked
        try:
            file = pq.ParquetFile(path, pre_buffer=False)
            if column not in file.schema_arrow.names:
                raise _no_column(source, None, column, file.schema_arrow.names)
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=[column]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    text = _checked(value, source.name, number, column)
                    yield Piece(text, source.name, number, True)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(f"not a sound parquet file: {error}", file=source.name) from None


def _hub(source: Source, column: str) -> Iterator[Piece]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    name = source.name
    try:
        rows = load_dataset(name, split="train", streaming=True, revision=source.revision)
        for number, row in enumerate(rows, start=1):
            if column not in row:
                raise _no_column(source, number, column, list(row))
            yield Piece(_checked(row[column], name, number, column), name, number, True)
    except ConnectionError as error:
        raise NetworkError(str(error), file=name, hint="try again, or pass a local file") from None
    except (DatasetNotFoundError, ValueError) as error:
        raise DataError(str(error).splitlines()[0], file=name) from None

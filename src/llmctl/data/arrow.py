"""Read rows of Arrow tables as the JSON that they were made of.

In: a parquet or Arrow file, or rows of the Hub. Out: dicts. Arrow gives all objects of a column the
same keys, so an object has null for each key that only others have: those are taken out of what is
nested in a row. Columns stay, and so do nulls in what is kept as JSON. Maps become objects, columns
of JSON what they spell, bytes that are UTF-8 text.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from llmctl.console import say_once
from llmctl.data.kinds import Kind
from llmctl.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

AT_ONCE = 1024
"""Rows that are made into objects together."""

NEEDED = frozenset({"role", "content", "from", "value"})
"""Keys of messages whose null says something: it is refused, or stands beside calls of tools."""

Read = Callable[[Any], Any]


class ArrowFile:
    """An open file of rows."""

    def __init__(self, file: Any, kind: Kind, name: str) -> None:
        """Open a path or a file; raise a DataError that calls it `name` where it is not sound."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.kind, self.name = kind, name
        self._errors = (pa.ArrowException, OSError, ValueError)
        try:
            if kind == "parquet":
                self._table = pq.ParquetFile(file, pre_buffer=False)
                self._schema = self._table.schema_arrow
            else:
                self._table = _open_arrow(file)
                self._schema = self._table.schema
        except self._errors as error:
            raise self._unsound(error) from None

    @property
    def columns(self) -> list[str]:
        """Names of the columns, in order."""
        return list(self._schema.names)

    def rows(self, columns: Sequence[str] | None) -> Iterator[dict[str, Any]]:
        """Read the rows in order, with only `columns` if given; raise a DataError for damage."""
        wanted = [f for f in self._schema if columns is None or f.name in columns]
        readers = {f.name: read for f in wanted if (read := _reader(f.type, self.name))}
        try:
            for batch in self._batches(None if columns is None else [f.name for f in wanted]):
                for row in batch.to_pylist():
                    for name, read in readers.items():
                        row[name] = read(row[name])
                    yield row
        except self._errors as error:
            raise self._unsound(error) from None

    def _batches(self, names: list[str] | None) -> "Iterator[pa.RecordBatch]":
        if self.kind == "parquet":
            yield from self._table.iter_batches(batch_size=AT_ONCE, columns=names)
            return
        for batch in self._table:
            for start in range(0, len(batch), AT_ONCE):
                part = batch.slice(start, AT_ONCE)
                yield part if names is None else part.select(names)

    def _unsound(self, error: Exception) -> DataError:
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        name = "parquet" if self.kind == "parquet" else "Arrow"
        return DataError(f"not a sound {name} file: {what}", file=self.name)


def plain_row(row: dict[str, Any], name: str, features: Any = None) -> dict[str, Any]:
    """Return a row that a library read from Arrow, without the nulls of other rows' keys.

    `name` is the source's, for the message that says so; `features` are those of `datasets`, which
    tell what was kept as JSON: a null in that was written.
    """

    def plain(value: Any, feature: Any) -> Any:
        if getattr(feature, "_type", None) == "Json":
            return value
        if isinstance(value, dict):
            kinds = feature if isinstance(feature, dict) else {}
            pruned = {key: plain(inner, kinds.get(key)) for key, inner in value.items()}
            return _object(pruned, name)
        if isinstance(value, list):
            item = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
            return [plain(inner, item) for inner in value]
        return _text(value) if isinstance(value, bytes) else value

    kinds = features or {}
    return {column: plain(value, kinds.get(column)) for column, value in row.items()}


def _open_arrow(file: Any) -> Any:
    """Open what `datasets` writes, a stream of record batches, or an Arrow file."""
    import pyarrow as pa

    opened = pa.memory_map(file) if isinstance(file, str) else pa.PythonFile(file, "r")
    is_file = opened.read(6) == b"ARROW1"
    opened.seek(0)
    if not is_file:
        return pa.ipc.open_stream(opened)
    return pa.ipc.open_file(opened).read_all().to_reader()


def _reader(kind: "pa.DataType", name: str) -> Read | None:
    """Return the function from Arrow's value of a type to JSON's; None where it is the same."""
    import pyarrow as pa

    types = pa.types
    if isinstance(kind, pa.BaseExtensionType):
        is_json = kind.extension_name == "arrow.json"
        return _optional(json.loads) if is_json else _reader(kind.storage_type, name)
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind):
        return _optional(_text)
    if types.is_map(kind):
        read = _reader(kind.item_type, name) or _same
        return _optional(lambda pairs: {key: read(value) for key, value in pairs})
    if types.is_struct(kind):
        fields = [(field.name, _reader(field.type, name) or _same) for field in kind]
        return _optional(
            lambda value: _object({key: read(value[key]) for key, read in fields}, name)
        )
    if types.is_dictionary(kind) or not types.is_nested(kind) or types.is_union(kind):
        return None
    inner = _reader(kind.value_type, name)
    return None if inner is None else _optional(lambda values: [inner(v) for v in values])


def _optional(read: Read) -> Read:
    return lambda value: None if value is None else read(value)


def _same(value: Any) -> Any:
    return value


def _object(value: dict[str, Any], name: str) -> dict[str, Any]:
    """Leave out the keys that are null, but for those of messages."""
    kept = {key: inner for key, inner in value.items() if inner is not None or key in NEEDED}
    if len(kept) < len(value) and not kept.keys() & NEEDED:
        say_once(
            f"{name}: null values inside tools and other nested objects are left out, since Arrow "
            "gives all objects of a column the same keys; jsonl keeps them"
        )
    return kept


def _text(value: bytes) -> str | bytes:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value

"""Lines and rows of JSON, strictly: whatever is not UTF-8 or not one JSON object is an error.

In: an open file, or its text, and what to call it. Out: numbered lines, and their objects.
"""

import json
import re
from collections.abc import Iterator
from typing import IO, Any, NoReturn

from llmctl.errors import DataError

LINE_BYTES = 64 << 20
"""Longest line; a longer one is a sign of a broken file."""

BYTE_ORDER_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


def read_lines(file: IO[bytes], place: str) -> Iterator[tuple[int, str]]:
    """1-based number and text of each line, its end included; a byte-order mark is dropped.

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
    """The object of a line of jsonl.

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
    """1-based line and value of each element of the JSON array that a text holds.

    Raises:
        DataError: not JSON, a key given twice, NaN or infinity; elements before it are told.
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

    Args:
        place: the file.
        offset: 0-based byte.
        head: the first two bytes of the file, which may say what it is instead.
    """
    marked = BYTE_ORDER_MARKS.get(head[:2])
    start = f"; it begins with a {marked} byte-order mark" if marked else ""
    raise DataError(
        f"not UTF-8 at byte {offset:,}{start}",
        file=place,
        hint=f"convert it: iconv -f {marked or 'ENCODING'} -t UTF-8 {place}",
    )


def json_type(value: Any) -> str:
    """What JSON calls a value's type."""
    names = {list: "an array", dict: "an object", type(None): "null", bool: "true or false"}
    return names.get(type(value), "text" if isinstance(value, str) else "a number")


def _not_json(error: ValueError | RecursionError, place: str, line: int) -> DataError:
    """The error for text that is no JSON and begins in this line."""
    if isinstance(error, json.JSONDecodeError):
        what, line = f"{error.msg} at column {error.colno}", max(line, error.lineno)
        return DataError(f"not JSON: {what}", file=place, line=line)
    return DataError(f"not JSON: {error}", file=place, line=line)


def _skip(text: str, at: int) -> int:
    """The next place that holds no white space."""
    found = _FILLED.search(text, at)
    return found.start() if found else len(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"duplicate key `{twice}`")
    return row


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


_FILLED = re.compile(r"[^ \t\n\r]")
DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)

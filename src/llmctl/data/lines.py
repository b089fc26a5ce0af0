"""Lines and rows of jsonl, strictly: whatever is not UTF-8 or not one JSON object is an error.

In: an open file and what to call it. Out: numbered lines, and their objects.
"""

import json
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
        row = _DECODER.decode(line.rstrip())
    except json.JSONDecodeError as error:
        raise DataError(
            f"not JSON: {error.msg} at column {error.colno}", file=place, line=number
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {error}", file=place, line=number) from None
    if not isinstance(row, dict):
        raise DataError(
            f"expected an object, got {json_type(row)}",
            file=place,
            line=number,
            hint="jsonl has one object a line",
        )
    return row


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


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"duplicate key `{twice}`")
    return row


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)

"""Tell what a file holds, text or rows in which form, and open it decompressed.

In: a file and the name that messages call it. Out: its `FileKind`. A known suffix tells the kind;
any other file, and what comes from a pipe, is what its beginning parses as, else plain text.
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from llmctl.console import log, say_once
from llmctl.errors import DataError
from llmctl.files import FETCH_LFS, LFS_POINTER

Kind = Literal["text", "jsonl", "json", "csv", "tsv", "parquet", "arrow", "hub", "builtin"]
Packing = Literal["gzip", "zstd", "xz", "bz2"]

SUFFIXES: dict[str, Kind] = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".jsonlines": "jsonl",
    ".jl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
PACKINGS: dict[str, Packing] = {".gz": "gzip", ".zst": "zstd", ".xz": "xz", ".bz2": "bz2"}
KNOWN = "txt, md, jsonl, json, csv, tsv, parquet or arrow, also .gz, .zst, .xz or .bz2"
REFUSED = {
    **dict.fromkeys(
        (".tar", ".tgz", ".tbz2", ".txz", ".zip", ".7z", ".rar"), f"unpack it to {KNOWN}"
    ),
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "save the sheet as .csv"),
    **dict.fromkeys((".docx", ".doc", ".odt", ".pdf", ".epub", ".pptx"), "save its text as .txt"),
}
"""Suffixes of files that hold no text as it is, and what to do instead."""

FOREIGN = {
    b"PK\x03\x04": ("a zip archive, as .docx and .xlsx files are", "save its text as .txt or .csv"),
    b"%PDF-": ("a PDF", "save its text as .txt"),
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": ("an Office document", "save its text as .txt or .csv"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", f"unpack it to {KNOWN}"),
}
"""What files that hold no text begin with."""

PACKED_MAGIC: dict[bytes, Packing] = {
    b"\x1f\x8b\x08": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\x00": "xz",
    b"BZh91AY&SY": "bz2",
}
BLOCK_BYTES = 1 << 20
LINE_BYTES = 64 << 20
"""Longest line; a longer one means a broken file."""

HEAD_BYTES = 1 << 16
HEAD_LINES = 20
"""Lines that tell the kind of a file: all that are not blank must agree, but for one broken row."""
CUT_CHARACTERS = 16
"""Where a text is cut off, so many characters may be no JSON: half a name, or half an escape."""

_JSON = re.compile(rb"(?:\xef\xbb\xbf)?\s*[\[{]")
_ARRAY = re.compile(rb"(?:\xef\xbb\xbf)?\s*\[\s*\{")
_COLUMN = re.compile(r"[^\W\d][\w.-]{0,63}")
"""Name of a column; prose has spaces and sentence marks."""
_WORDS = re.compile(r"[^\W\d][\w.-]{0,63}( [\w.-]{1,64}){0,3}")
"""Name of a column in several words."""


class FileKind(NamedTuple):
    """Form of a file's content, and its compression."""

    kind: Kind
    packing: Packing | None


def suffix_of(name: str | Path) -> str:
    """Return the suffix that tells the kind, the one before .gz, .zst, .xz or .bz2."""
    path = Path(name)
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in PACKINGS else suffix


def file_kind(path: Path, name: str) -> FileKind:
    """Find the kind of a file; its suffix is that of `name`.

    Says with -v what the file is read as, and warns once of text that looks like rows.

    Raises:
        DataError: unreadable, or a file that holds no text: an archive, a document of a word
            processor, the pointer of a file that git-lfs has not fetched.
    """
    found, head = _look_into(path, name)
    suffix = suffix_of(name)
    if suffix not in SUFFIXES and found.kind == "text" and _is_spread(head):
        found = found._replace(kind="json")  # which its reader refuses, as that of any .json
    if suffix in SUFFIXES and found.kind == "text" and _is_jsonl(head):
        say_once(
            f"{name}: each line is a JSON object, but the suffix {suffix} says plain text: it is "
            "read as text; name it .jsonl to read its rows",
            is_warning=True,
        )
    elif suffix not in SUFFIXES and found.kind == "text" and any(map(_is_object, _lines(head)[:1])):
        say_once(
            f"{name}: begins with a JSON object, but not every line is one: read as plain text",
            is_warning=True,
        )
    _log_kind(found, name)
    return found


def kind_in_folder(path: Path, name: str) -> FileKind | None:
    """Find the kind of a file that stands in a folder; None where it is no data.

    It is data where its suffix is known, or where what it begins as are rows: not a README, a
    picture or code.

    Raises:
        DataError: as `file_kind`, for a file of a known suffix.
    """
    if suffix_of(name) in SUFFIXES:
        return file_kind(path, name)
    try:
        found, _ = _look_into(path, name)
    except DataError:
        return None
    if found.kind == "text":
        return None
    _log_kind(found, name)
    return found


def _log_kind(found: FileKind, name: str) -> None:
    log.debug("%s: read as %s", name, ", ".join(filter(None, found)))


def _look_into(path: Path, name: str) -> tuple[FileKind, bytes]:
    """Find the kind of a file, and return its beginning, too."""
    suffix = suffix_of(name)
    if suffix in REFUSED:
        raise DataError(f"cannot read {suffix} files", file=name, hint=REFUSED[suffix])
    packing = PACKINGS.get(Path(name).suffix.lower()) or _packing(path, name)
    known = SUFFIXES.get(suffix)
    with open_file(path, packing, name) as file:
        head = file.read(HEAD_BYTES)
        _refuse_foreign(head, name)
        if known is None or known == "text":
            head += file.readline(LINE_BYTES) if _JSON.match(head) else b""
        return FileKind(known or _sniffed(head, file), packing), head


@contextmanager
def open_file(path: Path, packing: Packing | None, name: str) -> Iterator[IO[bytes]]:
    """Open a file, decompressed; a compressed file that is cut short or damaged is an error.

    Raises:
        DataError: it cannot be read; the error calls it `name`.
    """
    import lzma  # python may be built without it

    try:
        if packing is None:
            with path.open("rb", buffering=BLOCK_BYTES) as file:
                yield file
        elif packing == "zstd":
            import pyarrow as pa  # zstandard's own reader takes a truncated file for a whole one

            with pa.input_stream(str(path), compression="zstd") as stream:
                yield io.BufferedReader(stream, BLOCK_BYTES)
        else:
            with _unpacked(path, packing) as unpacked:
                yield io.BufferedReader(unpacked, BLOCK_BYTES)
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        what = "damaged" if packing else "cannot be read"
        raise DataError(f"{what}: {reason}", file=name) from None


def _unpacked(path: Path, packing: Packing) -> Any:
    if packing == "gzip":
        return gzip.open(path)
    if packing == "xz":
        import lzma

        return lzma.open(path)
    import bz2

    return bz2.open(path)


def _packing(path: Path, name: str) -> Packing | None:
    """Find the compression of a file without such a suffix by its first bytes."""
    with open_file(path, None, name) as file:
        head = file.read(max(map(len, PACKED_MAGIC)))
    return next((kind for magic, kind in PACKED_MAGIC.items() if head.startswith(magic)), None)


def _refuse_foreign(head: bytes, name: str) -> None:
    if head.startswith(LFS_POINTER):
        raise DataError(
            "a pointer of git-lfs, not the file itself",
            file=name,
            hint=FETCH_LFS,
        )
    for magic, (what, hint) in FOREIGN.items():
        if head.startswith(magic):
            raise DataError(f"{what}, which is no text", file=name, hint=hint)


def _sniffed(head: bytes, rest: IO[bytes]) -> Kind:
    """Tell the kind by the beginning of a file; `rest` is the open file after it."""
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return "arrow"
    if _is_jsonl(head, broken=1):
        return "jsonl"
    if _ARRAY.match(head) and (_is_array(head) or _is_array(head + rest.read(LINE_BYTES))):
        return "json"
    if _is_table(head, ",") or _is_table(head, ";"):
        return "csv"
    if _is_table(head, "\t"):
        return "tsv"
    return "text"


def _lines(head: bytes) -> list[str]:
    """Return the first lines that are not blank, without one that is cut off."""
    lines = head.decode(errors="replace").removeprefix("\ufeff").split("\n")
    if len(head) >= HEAD_BYTES and len(lines) > 1:
        lines.pop()
    return [line for line in lines if line.strip()][:HEAD_LINES]


def _is_jsonl(head: bytes, broken: int = 0) -> bool:
    """Whether each line is an object, but for so many `broken` ones beside two that are."""
    lines = _lines(head)
    objects = sum(map(_is_object, lines))
    others = len(lines) - objects
    return objects > 0 if not others else others <= broken and objects >= 2


def _is_object(line: str) -> bool:
    try:
        return line.lstrip().startswith("{") and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _is_spread(head: bytes) -> bool:
    """Whether a text begins with an object over several lines, and has nothing but JSON after it.

    The end of a long text is not looked at.
    """
    text = head.decode(errors="replace").removeprefix("\ufeff").strip()
    if not text.startswith("{"):
        return False
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except json.JSONDecodeError as error:
        is_cut = error.pos > len(text) - CUT_CHARACTERS or error.msg.startswith("Unterminated")
        return len(head) >= HEAD_BYTES and is_cut
    except (ValueError, RecursionError):
        return False
    return "\n" in text[:end] and text[end:].lstrip()[:1] in ("", "{", ",")


def _is_array(head: bytes) -> bool:
    """Whether a text begins as an array does whose first element is an object."""
    text = head.decode(errors="replace")
    try:
        _, end = json.JSONDecoder().raw_decode(text, text.index("{"))
    except (ValueError, RecursionError):
        return False
    return text[end:].lstrip()[:1] in (",", "]")


def _is_table(head: bytes, delimiter: str) -> bool:
    """Whether a text begins with a header of two names or more and rows of as many fields.

    Names may be of several words where there are two rows or more, and no field begins with a
    space, as what follows a comma in prose does.
    """
    csv.field_size_limit(LINE_BYTES)
    text = io.StringIO(head.decode(errors="replace").removeprefix("\ufeff"), newline="")
    table = csv.reader(text, delimiter=delimiter, strict=True)
    rows, is_cut = list[list[str]](), len(head) >= HEAD_BYTES
    try:
        for row in islice(table, HEAD_LINES):
            rows.append(row)
    except csv.Error:  # of a row that is cut off, or else this is no table
        rows = rows if is_cut else []
    else:
        rows = rows[:-1] if is_cut and len(rows) < HEAD_LINES else rows
    header, *rows = [row for row in rows if row] or [[]]
    if len(set(header)) != len(header) or len(header) < 2 or not rows:
        return False
    if any(len(row) != len(header) for row in rows):
        return False
    if all(map(_COLUMN.fullmatch, header)):
        return True
    is_prose = len(rows) < 2 or any(field.startswith(" ") for row in rows for field in row)
    return not is_prose and all(map(_WORDS.fullmatch, header))

"""Read documents from a source, piece by piece or whole, with strict checks.

In: a `Source`, or names of files, folders, Hub ids. Out: `Piece` objects, or whole texts. A plain
text file is one document in many pieces; a line of jsonl or a row is one document in one piece.
Text is kept to the byte. Whatever is not UTF-8, not JSON or not text is a DataError that names the
file and the line or byte.
"""

import codecs
import tempfile
from collections.abc import Iterator, Sequence
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any, NamedTuple

from llmctl.data import builtin
from llmctl.data.bad_rows import BadRows
from llmctl.data.builtin import PREFERENCES
from llmctl.data.kinds import BLOCK_BYTES
from llmctl.data.rows import (
    arrow_columns,
    checked_text,
    no_column,
    not_utf8,
    open_source,
    read_rows,
    said_columns,
)
from llmctl.data.sources import Source, find_sources, manifest_input
from llmctl.errors import DataError


class Piece(NamedTuple):
    """A stretch of one document."""

    text: str
    place: str
    """The file, or the name of the source."""
    line: int | None
    """1-based line or row; None where the file is the document."""
    is_last: bool


def read_pieces(source: Source, column: str, bad: BadRows | None = None) -> Iterator[Piece]:
    """Read the documents of a source in order; `column` holds the text of rows.

    `bad` counts the rows that are left out for their errors; without it none may be.

    Raises:
        DataError: text that is damaged, missing, null or not UTF-8, with its file and line or byte.
        NetworkError: a Hub data set that cannot be reached.
    """
    if source.kind == "text":
        return _text(source)
    if source.kind == "builtin" and not source.name.startswith(PREFERENCES):
        documents = enumerate(_built_in(source.name), start=1)
        return (Piece(text, source.name, number, True) for number, text in documents)
    return _rows(source, column, BadRows() if bad is None else bad)


def _built_in(name: str) -> Iterator[str]:
    if name.startswith(builtin.TASKS):
        return (f"{task.prompt}\n{task.answer}\n" for task in builtin.named_tasks(name)[1])
    return iter(builtin.python_docs())


def _rows(source: Source, column: str, bad: BadRows) -> Iterator[Piece]:
    bad.note_unread(set(arrow_columns(source)) - {column})
    for row, place, line in read_rows(source, [column], bad):
        try:
            if column not in row:
                raise no_column(column, list(row), place, line)
            text = checked_text(row[column], column, place, line)
        except DataError as error:
            bad(error)
        else:
            bad.note_unread(said_columns(row, {column}))
            yield Piece(text, place, line, True)


def _text(source: Source) -> Iterator[Piece]:
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    head, pending_text, consumed = b"", "", 0
    with open_source(source) as file:
        while True:
            block = file.read(BLOCK_BYTES)
            head = head or block[:2]
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                not_utf8(source.name, consumed - pending + error.start, head)
            consumed += len(block)
            if pending_text and (text or not block):
                yield Piece(pending_text, source.name, None, not block)
                pending_text = ""
            pending_text += text
            if not block:
                return


def read_texts(data: Sequence[str], most: int) -> tuple[list[str], list[str], list[dict[str, Any]]]:
    """Read text files as documents; return also the names of others, and the manifest's inputs.

    Raises:
        DataError: a file that is missing, not UTF-8, or holds nothing but white space.
    """
    texts: list[str] = []
    rows: list[str] = []
    inputs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="llmctl-") as spool:
        for name in data:
            sources = find_sources([name], Path(spool))
            if any(source.kind != "text" for source in sources):
                rows.append(name)
                continue
            for source in sources:
                text = _opening(source, most)
                if not text.strip():
                    raise DataError("an empty file: there is no text in it", file=source.name)
                texts.append(text)
                inputs.append(text_input("data", source, "text"))
    return texts, rows, inputs


def _opening(source: Source, most: int) -> str:
    text = ""
    for piece in read_pieces(source, "text"):
        text += piece.text
        if len(text) >= most:
            break
    return text[:most]


def text_input(role: str, source: Source, column: str, skip_bad_rows: int = 0) -> dict[str, Any]:
    """Return the manifest's record of a source of documents."""

    def digest() -> str:
        text_hash = sha256()
        for piece in read_pieces(source, column, BadRows(skip_bad_rows)):
            text_hash.update(piece.text.encode())
        return text_hash.hexdigest()

    return manifest_input(role, source, digest)


def hash_text(raw: bytes) -> int:
    """Hash a document to an integer from 0 to 2^64 - 1."""
    return int.from_bytes(blake2b(raw, digest_size=8).digest(), "little")

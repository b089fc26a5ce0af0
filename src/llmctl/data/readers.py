"""Read documents from a source, piece by piece, with strict checks.

In: a `Source`. Out: `Piece` objects. A plain text file is one document in many pieces; a line of
jsonl or a row is one document in one piece. Text is kept to the byte. Whatever is not UTF-8, not
JSON or not text is a DataError that names the file and the line or byte.
"""

import codecs
from collections.abc import Iterator
from typing import NamedTuple

from llmctl.data import builtin, tasks
from llmctl.data.courtesy import PREFERENCES
from llmctl.data.lines import not_utf8
from llmctl.data.records import BLOCK_BYTES, checked_text, no_column, opened, read_records
from llmctl.data.sources import Source


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
    if source.kind == "text":
        return _text(source)
    if source.kind == "builtin" and not source.name.startswith(PREFERENCES):
        documents = enumerate(_built_in(source.name), start=1)
        return (Piece(text, source.name, number, True) for number, text in documents)
    return _rows(source, column)


def _built_in(name: str) -> Iterator[str]:
    if name.startswith(tasks.TASKS):
        return (f"{task.prompt}\n{task.answer}\n" for task in tasks.named(name)[1])
    return iter(builtin.python_docs())


def _rows(source: Source, column: str) -> Iterator[Piece]:
    for row, place, line in read_records(source, [column]):
        if column not in row:
            raise no_column(column, list(row), place, line)
        yield Piece(checked_text(row[column], column, place, line), place, line, True)


def _text(source: Source) -> Iterator[Piece]:
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    head, waiting, consumed = b"", "", 0
    with opened(source) as file:
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

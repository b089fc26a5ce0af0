"""Append rows to a jsonl file, each on the disk before the next is requested.

In: rows, and a function that checks those already there. Out: a file that survives a kill: a row
cut off at its end was never acknowledged, and is dropped. Only the last row can be taken back.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmctl.console import log
from llmctl.data.kinds import LINE_BYTES
from llmctl.data.rows import DECODER
from llmctl.errors import OutputError
from llmctl.files import fsync, json_line, writing

Row = dict[str, Any]
Check = Callable[[Row], str | None]
"""Returns what is wrong with a row, None where nothing is."""
PREFIX = b'{"prompt": '
"""Beginning of every row of a ranking, also of one that was cut off."""


@dataclass(frozen=True)
class LogContent:
    """Content of a file."""

    rows: list[Row]
    starts: list[int]
    """Byte offset of each row."""
    end: int
    """Bytes up to the end of the last whole row."""
    is_open: bool
    """Whether the last row lacks its newline."""


def read_append_log(path: Path, check: Check, prefix: bytes = PREFIX) -> LogContent:
    """Read the rows of a file, none where there is no file.

    Every row begins with `prefix`; `check` says what is wrong with one.

    Raises:
        OutputError: it holds something else.
    """
    rows: list[Row] = []
    starts: list[int] = []
    end, is_open = 0, False
    if not path.exists():
        return LogContent(rows, starts, end, is_open)
    with writing(path), path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(LINE_BYTES), b""), start=1):
            is_open = not line.endswith(b"\n")
            row, problem = _parse(line, check)
            if problem and is_open and row is None and line[: len(prefix)] == prefix[: len(line)]:
                return LogContent(rows, starts, end, False)
            if problem:
                raise OutputError(problem, file=path, line=number, hint="choose another --out")
            if row is not None:
                rows.append(row)
                starts.append(end)
            end += len(line)
    return LogContent(rows, starts, end, is_open)


def _parse(line: bytes, check: Check) -> tuple[Row | None, str | None]:
    """Parse a line: its row, None for a blank one, and what is wrong with it."""
    if not line.strip():
        return None, None
    try:
        row = DECODER.decode(line.decode().strip())
    except (ValueError, RecursionError):
        return None, "holds something that is not jsonl"
    if not isinstance(row, dict):
        return None, "holds something that is not jsonl of objects"
    return row, check(row)


class AppendLog:
    """An open file of rows."""

    def __init__(
        self, path: Path, descriptor: int, content: LogContent, prefix: bytes = PREFIX
    ) -> None:
        """Continue a file after what was read from it; its rows begin with `prefix`."""
        self._prefix = prefix
        self.path, self.rows = path, list(content.rows)
        self._descriptor, self._starts, self._end = descriptor, list(content.starts), content.end

    def append(self, row: Row) -> None:
        """Write a row, and wait until it is on the disk; leave nothing of one that fails.

        Raises:
            OutputError: another program wrote to the file, or replaced it.
            ResourceError: the disk is full or fails.
        """
        line = f"{json_line(row)}\n".encode()
        assert line.startswith(self._prefix), "a reader could not tell that it was cut off"
        self._require_unchanged()
        with writing(self.path):
            try:
                _write(self._descriptor, line)
                os.fsync(self._descriptor)
            except OSError:
                os.ftruncate(self._descriptor, self._end)
                raise
        self.rows.append(row)
        self._starts.append(self._end)
        self._end += len(line)

    def drop_last(self) -> Row:
        """Remove the last row from the file and return it.

        Raises:
            OutputError: another program wrote to the file, or replaced it.
            ResourceError: the disk fails.
        """
        self._require_unchanged()
        with writing(self.path):
            os.ftruncate(self._descriptor, self._starts[-1])
            os.fsync(self._descriptor)
        self._end = self._starts.pop()
        return self.rows.pop()

    def _require_unchanged(self) -> None:
        opened = os.fstat(self._descriptor)
        try:
            current = self.path.stat()
        except FileNotFoundError:
            current = None
        if current is None or not os.path.samestat(opened, current) or current.st_size != self._end:
            raise OutputError(
                "another program has changed this file",
                file=self.path,
                hint="stop and start again: what stands in it then counts",
            )


@contextmanager
def open_append_log(path: Path, check: Check, prefix: bytes = PREFIX) -> Iterator[AppendLog]:
    """Open a file of rows, made where there is none; drop a row that was cut off.

    A body that fails before the first row leaves no new file. Arguments as `read_append_log`.

    Raises:
        OutputError: it holds something else, or must not be written.
        ResourceError: the disk is full or fails.
    """
    content, existed = read_append_log(path, check, prefix), path.exists()
    with writing(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    try:
        with writing(path):
            content = _drop_cut_row(path, descriptor, content)
        yield AppendLog(path, descriptor, content, prefix)
    except BaseException:
        if not existed and os.fstat(descriptor).st_size == 0:
            path.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


def _drop_cut_row(path: Path, descriptor: int, content: LogContent) -> LogContent:
    """Make the file end where its last row ends."""
    if os.fstat(descriptor).st_size > content.end:
        log.warning("%s: the last row was cut off, and is dropped", path)
        os.ftruncate(descriptor, content.end)
    end = content.end
    if content.is_open:
        _write(descriptor, b"\n")
        end += 1
    os.fsync(descriptor)
    fsync(path.absolute().parent)
    return LogContent(content.rows, content.starts, end, False)


def _write(descriptor: int, content: bytes) -> None:
    while content:
        content = content[os.write(descriptor, content) :]

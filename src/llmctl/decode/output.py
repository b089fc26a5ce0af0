"""Write responses: rows of jsonl in a file or on stdout, or plain texts with a line between."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmctl.console import log
from llmctl.decode.loop import Response
from llmctl.files import json_line, staged, writing
from llmctl.numbers import counted

Row = dict[str, Any]
Emit = Callable[[Row], None]


@contextmanager
def open_rows(out: Path | None, *, as_json: bool) -> Iterator[Emit]:
    """Give a function that writes a row; a file appears whole, or as an interrupt left it."""
    if out is None:
        if as_json:
            yield lambda row: print(json_line(row), flush=True)
        else:
            yield _printer()
        return
    staging = staged(out)
    try:
        with writing(out), staging.open("w", encoding="utf-8") as file:
            yield lambda row: print(json_line(row), file=file)
    except KeyboardInterrupt:
        staging.replace(out)
        raise
    except BaseException:
        staging.unlink(missing_ok=True)
        raise
    staging.replace(out)


def write_rows(
    responses: Iterable[Response], row_of: Callable[[Response], Row], emit: Emit, total: int
) -> tuple[int, int]:
    """Write every response in order; log the speed on stderr.

    Returns:
        Rows and tokens written.
    """
    started = time.monotonic()
    written = tokens = 0

    def write(response: Response) -> None:
        nonlocal written, tokens
        written += 1
        tokens += len(response.tokens)
        emit(row_of(response))

    try:
        in_order(responses, write)
    finally:
        if total > 1:
            speed = tokens / (time.monotonic() - started)
            made = counted(tokens, "token")
            log.info("%d of %d responses, %s, %.0f tokens/s", written, total, made, speed)
    return written, tokens


def in_order(responses: Iterable[Response], write: Callable[[Response], None]) -> None:
    """Write responses in the order of their prompts, each as soon as those before it are finished.

    On an interrupt those that were still waiting for an earlier one are written too.
    """
    waiting: dict[int, Response] = {}
    index = 0
    try:
        for response in responses:
            waiting[response.index] = response
            while index in waiting:
                write(waiting.pop(index))
                index += 1
    except KeyboardInterrupt:
        for index in sorted(waiting):
            write(waiting[index])
        raise


def _printer() -> Emit:
    """Print responses with a blank line between them."""
    between = ""

    def emit(row: Row) -> None:
        nonlocal between
        print(f"{between}{row['response']}", flush=True)
        between = "\n"

    return emit

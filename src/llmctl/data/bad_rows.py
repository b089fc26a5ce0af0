"""Place the errors of rows, count what is left out for them, name the columns that nothing reads.

In: errors of rows, from their reading to their encoding. Out: one line for all of them, or the
error that is one too many.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from llmctl.console import log
from llmctl.data.rows import quote_names, shown_name
from llmctl.errors import DataError, ModelError
from llmctl.numbers import counted


@contextmanager
def at_row(place: str | None, line: int | None) -> Iterator[None]:
    """Give an error that a row brings up the row's place, unless it names one."""
    try:
        yield
    except (DataError, ModelError) as error:
        if error.file is None:
            error.file, error.line = place, line
        raise


class BadRows:
    """Rows of one run that are left out, up to a limit."""

    def __init__(self, limit: int = 0) -> None:
        """Allow so many, of all sources together (`--skip-bad-rows`)."""
        self.limit = limit
        self.count = 0
        self._first = ""
        self._unread: dict[str, None] = {}

    def __call__(self, error: DataError) -> None:
        """Leave out a row for its error; raise the error where it is one too many."""
        self.count += 1
        self._first = self._first or str(error).splitlines()[0]
        if self.count > self.limit:
            if self.limit:
                error.message += (
                    f" ({counted(self.count, 'bad row')}, --skip-bad-rows {self.limit:,})"
                )
            raise error

    def note_unread(self, names: Iterable[str]) -> None:
        """Remember columns, or keys of messages, that say something and that nothing reads."""
        self._unread.update(dict.fromkeys(map(shown_name, names)))

    @property
    def unread(self) -> list[str]:
        """The columns that nothing reads, in order."""
        return sorted(self._unread)

    def report(self) -> None:
        """Say what was left out, and what was not read."""
        if self._unread:
            log.info("columns not read: %s", quote_names(self.unread))
        if self.count:
            rows = counted(self.count, "row")
            log.warning("left out %s that cannot be used, the first: %s", rows, self._first)

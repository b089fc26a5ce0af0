"""Questions as they become ready: a model writes responses ahead while a person ranks.

In: entries, what was written before, and a function that writes. Out: questions, by their place.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress

from llmctl.feedback.answers import Written
from llmctl.feedback.questions import Entry, Question, canonical

Write = Callable[[int, Callable[[], bool]], Sequence[str]]
"""Responses to the entry at a place; asks again and again whether it is to give up."""


class GivenUp(Exception):
    """The responses are not wanted any more."""


class Supply:
    """The questions of all entries, None where the responses are still to be written."""

    def __init__(self, entries: Sequence[Entry], written: dict[str, tuple[str, ...]]) -> None:
        """Take what is there: with the entries, or from an earlier run by canonical prompt."""
        self.entries = entries
        self.changed = threading.Condition()
        """Held while anything here, or of a session, is read or changed."""
        self.failure: BaseException | None = None
        """What ended the writing before its time."""
        self.questions: list[Question | None] = []
        for entry in entries:
            texts = entry.responses or written.get(canonical(entry.ask.prompt))
            self.questions.append(Question(entry.ask.prompt, texts) if texts else None)

    def missing(self) -> list[int]:
        """Places whose responses are still to be written."""
        return [place for place, question in enumerate(self.questions) if question is None]

    def put(self, place: int, question: Question) -> None:
        """Make a question ready."""
        with self.changed:
            self.questions[place] = question
            self.changed.notify_all()

    def end(self, writing: Future[None]) -> None:
        """Hear that no more will come, and whether something went wrong."""
        with self.changed:
            self.failure = writing.exception()
            self.changed.notify_all()


@contextmanager
def writing_ahead(supply: Supply, write: Write, keep: Written) -> Iterator[None]:
    """While the body runs, a thread writes what is missing, in order; then it is given up.

    Args:
        supply: what to fill.
        write: writes the responses to one entry.
        keep: where each question's responses are kept before it is asked.
    """
    over = threading.Event()

    def work() -> None:
        with suppress(GivenUp):
            for place in supply.missing():
                texts = tuple(write(place, over.is_set))
                question = Question(supply.entries[place].ask.prompt, texts)
                keep.add(question)
                supply.put(place, question)

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="llmctl-writer") as pool:
        pool.submit(work).add_done_callback(supply.end)
        try:
            yield
        finally:
            over.set()

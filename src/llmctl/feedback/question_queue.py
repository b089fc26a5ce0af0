"""Questions as they become ready: a model generates responses ahead while a person ranks.

In: entries, earlier responses, and a function that generates. Out: questions, by their place.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress

from llmctl.feedback.answers import ResponseFile
from llmctl.feedback.questions import Entry, Question

Generate = Callable[[int, Callable[[], bool]], Sequence[str]]
"""Function of an entry's place, and of whether to give up, to the responses."""


class GenerationCancelled(Exception):
    """The responses are no longer wanted."""


class QuestionQueue:
    """The questions of all entries, None where the responses are missing."""

    def __init__(self, entries: Sequence[Entry], responses: dict[str, tuple[str, ...]]) -> None:
        """Take the responses of the entries, or of an earlier run by canonical prompt."""
        self.entries = entries
        self.changed = threading.Condition()
        """Held while anything here, or of a session, is read or changed."""
        self.failure: BaseException | None = None
        """Error that ended generation."""
        self.questions: list[Question | None] = []
        for entry in entries:
            texts = entry.responses or responses.get(entry.prompt_key)
            self.questions.append(entry.question(texts) if texts else None)

    def missing(self) -> list[int]:
        """Return the places whose responses are missing."""
        return [place for place, question in enumerate(self.questions) if question is None]

    def put(self, place: int, question: Question) -> None:
        """Make a question ready."""
        with self.changed:
            self.questions[place] = question
            self.changed.notify_all()

    def end(self, generation: Future[None]) -> None:
        """Note that no more will come, and the error if there was one."""
        with self.changed:
            self.failure = generation.exception()
            self.changed.notify_all()


@contextmanager
def generating_ahead(
    queue: QuestionQueue, generate: Generate, file: ResponseFile
) -> Iterator[None]:
    """Generate missing responses in a thread, in order, while the body runs; then give up.

    They are in the file before their question is in the queue.
    """
    over = threading.Event()

    def work() -> None:
        with suppress(GenerationCancelled):
            for place in queue.missing():
                texts = tuple(generate(place, over.is_set))
                question = queue.entries[place].question(texts)
                file.add(question)
                queue.put(place, question)

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="llmctl-generator") as pool:
        pool.submit(work).add_done_callback(queue.end)
        try:
            yield
        finally:
            over.set()

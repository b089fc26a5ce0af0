"""One person's ranking: the question now, the answers, and how many are left.

In: a queue of questions and the file of answers. Out: the question to show, one at a time, in the
order of the data. The page and the terminal both drive it, from whatever thread.
"""

import getpass
from dataclasses import dataclass

from llmctl.config.commands.rank import is_name, normal_name
from llmctl.errors import UserError
from llmctl.feedback.answers import AnswerFile
from llmctl.feedback.question_queue import QuestionQueue
from llmctl.feedback.questions import Question, is_ranking


@dataclass(frozen=True)
class Counts:
    """Numbers of questions; the four parts add up to all of them."""

    answered: int
    skipped: int
    identical: int
    """Left out: their responses are all the same."""
    remaining: int

    @property
    def total(self) -> int:
        """Questions that are asked, as far as is known."""
        return self.answered + self.skipped + self.remaining

    @property
    def settled(self) -> int:
        """Questions that the person has dealt with."""
        return self.answered + self.skipped


def login_name() -> str:
    """Return the name of the logged-in user.

    Raises:
        UserError: the system does not know it.
    """
    try:
        name = normal_name(getpass.getuser())
    except (KeyError, OSError, ImportError):
        name = ""
    if not is_name(name):
        raise UserError("--annotator is required: the system does not say who you are")
    return name


class Session:
    """The state of a ranking. An action that fails leaves it as it was."""

    def __init__(
        self, queue: QuestionQueue, answers: AnswerFile, annotator: str, seed: int
    ) -> None:
        """Continue after this person's last answer."""
        self.annotator, self._seed = annotator, seed
        self._queue, self._answers = queue, answers
        self._is_finished = False

    def current(self) -> Question | None:
        """Return the first question that is ready and not answered; None while there is none."""
        with self._queue.changed:
            for question in self._queue.questions:
                if question is None:
                    return None
                if question.key not in self._answers.mine and len(question.texts) > 1:
                    return question
            return None

    def shown(self, question: Question) -> list[str]:
        """Return the question's texts in this person's order."""
        return question.shown(self._seed, self.annotator)

    def counts(self) -> Counts:
        """Count the questions."""
        with self._queue.changed:
            mine = self._answers.mine
            ready = [q for q in self._queue.questions if q is not None]
            skipped = sum(mine.get(q.key, False) for q in ready)
            answered = sum(q.key in mine for q in ready) - skipped
            identical = sum(len(q.texts) == 1 and q.key not in mine for q in ready)
            remaining = len(self._queue.questions) - answered - skipped - identical
            return Counts(answered, skipped, identical, remaining)

    def answer(self, key: str, ranks: list[int] | None) -> bool:
        """Record the ranks of the texts as they were shown, or None where the question is skipped.

        Returns:
            Whether the key is the current question's: another window may have answered it.

        Raises:
            UserError: no ranks of these texts.
            OutputError: another program has changed the file.
            ResourceError: the disk is full or fails.
        """
        with self._queue.changed:
            question = self.current()
            if question is None or question.key != key:
                return False
            if ranks is not None:
                if not is_ranking(ranks, len(question.texts)):
                    raise UserError("not the ranks of the responses")
                ranks = question.ranks(ranks, self._seed, self.annotator)
            self._answers.add(question, ranks)
            self._queue.changed.notify_all()
            return True

    def can_undo(self) -> bool:
        """Whether the file's last answer is this person's, to a question that is asked here."""
        with self._queue.changed:
            last = self._answers.last()
            return last is not None and any(
                question is not None and question.key == last for question in self._queue.questions
            )

    def undo(self) -> bool:
        """Take the last answer back, to ask its question again; return whether there was one.

        Raises:
            OutputError: another program has changed the file.
            ResourceError: the disk fails.
        """
        with self._queue.changed:
            if not self.can_undo():
                return False
            self._answers.remove_last()
            return True

    def wait(self) -> Question | None:
        """Return the next question as soon as it is ready, None when all are answered.

        Raises:
            UserError: the error that ended generation.
        """
        with self._queue.changed:
            while (question := self.current()) is None and self.counts().remaining:
                self._wait()
            return question

    def finish(self) -> None:
        """End the session."""
        with self._queue.changed:
            self._is_finished = True
            self._queue.changed.notify_all()

    def wait_until_finished(self) -> None:
        """Wait until the session ends.

        Raises:
            UserError: the error that ended generation.
        """
        with self._queue.changed:
            while not self._is_finished:
                self._wait()

    def _wait(self) -> None:
        """Wait for a change; raise generation's error once all ready questions are answered."""
        if self._queue.failure is not None and self.current() is None:
            raise self._queue.failure
        self._queue.changed.wait()

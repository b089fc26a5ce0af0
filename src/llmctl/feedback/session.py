"""One person ranking: what is asked now, what was answered, and how far it is.

In: a supply of questions and the file of answers. Out: the question to show, one at a time, in the
order of the data. The page and the terminal both drive it, from whatever thread.
"""

import getpass
from dataclasses import dataclass

from llmctl.config.commands.rank import is_name
from llmctl.errors import UserError
from llmctl.feedback.answers import Answers
from llmctl.feedback.questions import Question, are_ranks
from llmctl.feedback.supply import Supply


@dataclass(frozen=True)
class Counts:
    """How far it is; the four parts add up to all questions."""

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


def user_name() -> str:
    """Who is logged in.

    Raises:
        UserError: nobody knows.
    """
    try:
        name = getpass.getuser()
    except (KeyError, OSError, ImportError):
        name = ""
    if not is_name(name):
        raise UserError("--annotator is required: the system does not say who you are")
    return name


class Session:
    """The state of it. What fails leaves it as it was."""

    def __init__(self, supply: Supply, answers: Answers, annotator: str, seed: int) -> None:
        """Continue where this person was."""
        self.annotator, self._seed = annotator, seed
        self._supply, self._answers = supply, answers
        self._is_finished = False

    def current(self) -> Question | None:
        """The first question that is ready and not answered; None while there is none."""
        with self._supply.changed:
            for question in self._supply.questions:
                if question is None:
                    return None
                if question.key not in self._answers.mine and len(question.texts) > 1:
                    return question
            return None

    def shown(self, question: Question) -> list[str]:
        """The question's texts in this person's order."""
        return question.shown(self._seed, self.annotator)

    def counts(self) -> Counts:
        """How far it is."""
        with self._supply.changed:
            mine = self._answers.mine
            found = [q for q in self._supply.questions if q is not None]
            skipped = sum(mine.get(q.key, False) for q in found)
            answered = sum(q.key in mine for q in found) - skipped
            identical = sum(len(q.texts) == 1 and q.key not in mine for q in found)
            remaining = len(self._supply.questions) - answered - skipped - identical
            return Counts(answered, skipped, identical, remaining)

    def answer(self, key: str, ranks: list[int] | None) -> bool:
        """Keep the ranks of the texts as they were shown, or None where the question is skipped.

        Returns:
            Whether the key is the current question's: another window may have answered it.

        Raises:
            UserError: no ranks of these texts.
            OutputError: another program has changed the file.
            ResourceError: the disk is full or fails.
        """
        with self._supply.changed:
            question = self.current()
            if question is None or question.key != key:
                return False
            if ranks is not None:
                if not are_ranks(ranks, len(question.texts)):
                    raise UserError("not the ranks of the responses")
                ranks = question.ranks(ranks, self._seed, self.annotator)
            self._answers.add(question, ranks)
            self._supply.changed.notify_all()
            return True

    def can_undo(self) -> bool:
        """Whether the file's last answer is this person's, to a question that is asked here."""
        with self._supply.changed:
            last = self._answers.last()
            return last is not None and any(
                question is not None and question.key == last for question in self._supply.questions
            )

    def undo(self) -> bool:
        """Take the last answer back, so that its question is asked again; whether there was one.

        Raises:
            OutputError: another program has changed the file.
            ResourceError: the disk fails.
        """
        with self._supply.changed:
            if not self.can_undo():
                return False
            self._answers.take_back()
            return True

    def wait(self) -> Question | None:
        """The next question, as soon as it is ready; None when all are answered.

        Raises:
            UserError: what kept the model from writing.
        """
        with self._supply.changed:
            while (question := self.current()) is None and self.counts().remaining:
                self._wait()
            return question

    def finish(self) -> None:
        """The person leaves."""
        with self._supply.changed:
            self._is_finished = True
            self._supply.changed.notify_all()

    def wait_until_finished(self) -> None:
        """Return when the person leaves.

        Raises:
            UserError: what kept the model from writing.
        """
        with self._supply.changed:
            while not self._is_finished:
                self._wait()

    def _wait(self) -> None:
        """Wait for a change; a model that failed is said once all it has written is answered."""
        if self._supply.failure is not None and self.current() is None:
            raise self._supply.failure
        self._supply.changed.wait()

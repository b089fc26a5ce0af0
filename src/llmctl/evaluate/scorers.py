"""Score one response against its reference, by the libraries that define the scores.

In: response and reference. Out: numbers of the row; `aggregate.py` sums them up.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from llmctl.config.commands import EvaluateConfig
from llmctl.errors import DataError, require_extra
from llmctl.evaluate.inputs import EvaluationExample
from llmctl.ppo.rules import plain

LIBRARIES = {
    "rouge": "rouge_score",
    "bleu": "sacrebleu",
    "chrf": "sacrebleu",
    "wer": "jiwer",
    "f1": "sklearn",
}
ROUGE = ("rouge1", "rouge2", "rougeL")
ANSWER_METRICS = ("exact", "accuracy", "f1")
"""Metrics that look at the answer within a response."""


def require_libraries(metrics: Sequence[str]) -> None:
    """See that what the metrics need is installed.

    Raises:
        ResourceError: with the extra to install.
    """
    for name in metrics:
        if name in LIBRARIES:
            require_extra(LIBRARIES[name], "evaluate", f"--metrics {name}")


@dataclass(frozen=True)
class Scorer:
    """The metrics of a run."""

    metrics: tuple[str, ...]
    pattern: re.Pattern[str] | None
    """Finds the answer in a response."""
    labels: tuple[str, ...]
    """To look for in responses."""

    def score(self, response: str, reference: str) -> dict[str, Any]:
        """What a row says beside response and reference."""
        found: dict[str, Any] = {}
        if any(name in ANSWER_METRICS for name in self.metrics) and self.pattern is not None:
            found["answer"] = self.answer(response)
            found["expected"] = self.answer(reference)
        for name in self.metrics:
            match name:
                case "exact":
                    given = found.get("answer", response)
                    right = given is not None and plain(given) == plain(
                        found.get("expected", reference)
                    )
                    found["exact"] = float(right)
                case "accuracy" | "f1":
                    given = found.get("answer", response) or ""
                    found["label"] = find_label(given, self.labels)
                    found["reference_label"] = self.canonical_label(found.get("expected", reference))
                    found["right"] = float(found["label"] == found["reference_label"])
                case "rouge":
                    scores = self._rouge.score(reference, response)
                    found |= {kind: float(scores[kind].fmeasure) for kind in ROUGE}
                case "bleu":
                    found["bleu"] = self._bleu.sentence_score(response, [reference]).score
                case "chrf":
                    found["chrf"] = self._chrf.sentence_score(response, [reference]).score
                case "wer":
                    found |= word_errors(response, reference)
        return found

    def answer(self, text: str) -> str | None:
        """The answer that the pattern finds in a text, None where it finds none."""
        return text if self.pattern is None else extract(self.pattern, text)

    def canonical_label(self, label: str) -> str | None:
        """The label as it is listed, whatever its case; None where it is not."""
        return next((known for known in self.labels if plain(known) == plain(label)), None)

    @cached_property
    def _rouge(self) -> Any:
        from rouge_score.rouge_scorer import RougeScorer

        return RougeScorer(list(ROUGE))

    @cached_property
    def _bleu(self) -> Any:
        from sacrebleu.metrics import BLEU

        return BLEU(effective_order=True)

    @cached_property
    def _chrf(self) -> Any:
        from sacrebleu.metrics import CHRF

        return CHRF()


def make_scorer(config: EvaluateConfig, questions: Sequence[EvaluationExample]) -> Scorer:
    """The metrics that a run asks for, fitted to its references.

    Raises:
        DataError: a reference without an answer, or with a label that is not in the list.
        ResourceError: a library that is not installed.
    """
    require_libraries(config.metrics)
    pattern = None if config.answer_regex is None else re.compile(config.answer_regex)
    bare = Scorer(tuple(config.metrics), pattern, ())
    answers = [bare.answer(question.reference or "") for question in questions]
    wanted = [name for name in config.metrics if name in ANSWER_METRICS]
    for question, answer in zip(questions, answers, strict=True):
        if wanted and answer is None:
            raise DataError(
                f"--answer-regex finds no answer in the reference {question.reference!r:.60}",
                file=question.place,
                line=question.line,
            )
    if not {"accuracy", "f1"} & set(config.metrics):
        return bare
    known = dict.fromkeys(config.labels or [answer.strip() for answer in answers if answer])
    scorer = Scorer(tuple(config.metrics), pattern, tuple(known))
    for question, answer in zip(questions, answers, strict=True):
        if scorer.canonical_label(answer or "") is None:
            raise DataError(
                f"the label `{answer}` is none of --labels {','.join(config.labels)}",
                file=question.place,
                line=question.line,
            )
    return scorer


def extract(pattern: re.Pattern[str], text: str) -> str | None:
    """The last match of a pattern, of its first group that took part where it has any."""
    found = list(pattern.finditer(text))
    if not found:
        return None
    groups = [group for group in found[-1].groups() if group is not None]
    return str(groups[0] if groups else found[-1][0])


def find_label(text: str, labels: Sequence[str]) -> str | None:
    """The label that a text is, or that stands first in it as a word; the longest of several."""
    exact = next((label for label in labels if plain(label) == plain(text)), None)
    if exact is not None:
        return exact
    places = []
    for label in labels:
        found = re.search(rf"(?<!\w){re.escape(label)}(?!\w)", text, re.IGNORECASE)
        if found:
            places.append((found.start(), -len(label), label))
    return min(places)[2] if places else None


def word_errors(response: str, reference: str) -> dict[str, int]:
    """Words to change, to add and to leave out, and the words of the reference."""
    import jiwer

    found = jiwer.process_words(reference, response)
    errors = found.substitutions + found.deletions + found.insertions
    words = found.substitutions + found.deletions + found.hits
    return {"word_errors": int(errors), "words": int(words)}

"""Score one response against its reference, by the libraries that define the scores.

In: response and reference. Out: numbers of the row; `aggregate.py` sums them up.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from typing import Any

from llmctl.config.commands.evaluate import EvaluateConfig
from llmctl.errors import require_extra
from llmctl.evaluate.inputs import EvaluationExample
from llmctl.evaluate.labels import named_labels
from llmctl.text_forms import (
    canonical,
    normalize_answer,
    separate,
    split_letters_only,
    split_words,
)

LIBRARIES = {
    "rouge": "rouge_score",
    "bleu": "sacrebleu",
    "chrf": "sacrebleu",
    "wer": "jiwer",
    "f1": "sklearn",
}
ROUGE = ("rouge1", "rouge2", "rougeL")
ANSWER_METRICS = ("exact", "accuracy", "f1")
"""Metrics that compare the answer within a response."""
NUMBER = re.compile(
    r"(?P<sign>[-+\u2212]?)(?P<dollar>\$?)(?P<second>[-+\u2212]?)"
    r"(?P<digits>(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?P<percent>%?)[.,]?"
)
"""A number with thousands commas and what ends its sentence, of dollars or percent."""


@dataclass(frozen=True)
class Scorer:
    """Scores responses by the metrics of a run."""

    metrics: tuple[str, ...]
    pattern: re.Pattern[str] | None
    """Finds the answer in a response."""
    labels: tuple[str, ...]
    """To look for in responses."""

    def score(self, response: str, reference: str) -> dict[str, Any]:
        """The scores of a row, with the answers or labels that they compare."""
        scores: dict[str, Any] = {}
        if any(name in ANSWER_METRICS for name in self.metrics) and self.pattern is not None:
            scores["answer"] = self.answer(response)
            scores["expected"] = self.answer(reference)
            scores["compared"] = compared_as(scores["answer"], scores["expected"])
        answer = scores.get("answer", response)
        expected = scores.get("expected", reference)
        for name in self.metrics:
            match name:
                case "exact":
                    scores["exact"] = float(answer is not None and self.is_same(answer, expected))
                case "accuracy" | "f1":
                    scores["named"] = named_labels(answer or "", self.labels, self.is_same)
                    scores["label"] = scores["named"][0] if len(scores["named"]) == 1 else None
                    scores["reference_label"] = self.canonical_label(expected)
                    scores["right"] = float(scores["label"] == scores["reference_label"])
                case "rouge":
                    rouge = _library_scorer(name).score(reference, response)
                    scores |= {kind: float(rouge[kind].fmeasure) for kind in ROUGE}
                case "bleu" | "chrf":
                    scorer, form = _library_scorer(name), FORMS[name]
                    scores[name] = scorer.sentence_score(form(response), [form(reference)]).score
                case "wer":
                    scores |= word_errors(response, reference)
        return scores

    def answer(self, text: str) -> str | None:
        """The answer that the pattern finds in a text, None where it finds none."""
        return text if self.pattern is None else extract(self.pattern, text)

    def is_same(self, answer: str, reference: str) -> bool:
        """Compare answers that a pattern found as numbers where both are; all others as texts."""
        if self.pattern is not None and compared_as(answer, reference) == "numbers":
            return as_number(answer) == as_number(reference)
        return is_same(answer, reference)

    def canonical_label(self, label: str) -> str | None:
        """The label as it is listed, whatever its case; None where it is not."""
        return next((known for known in self.labels if self.is_same(known, label)), None)


class _Words:
    """Splits texts for rouge-score, whose own tokenizer knows the letters a to z only."""

    def tokenize(self, text: str) -> list[str]:
        """See `split_letters_only`, which does the same to texts of ASCII."""
        return split_letters_only(text)


FORMS = {"bleu": separate, "chrf": canonical}
"""What is done to texts before sacrebleu splits them."""


@cache
def _library_scorer(metric: str) -> Any:
    """The scorer of single responses for rouge, bleu or chrf."""
    if metric == "rouge":
        from rouge_score.rouge_scorer import RougeScorer

        return RougeScorer(list(ROUGE), tokenizer=_Words())
    from sacrebleu.metrics import BLEU, CHRF

    return BLEU(effective_order=True) if metric == "bleu" else CHRF()


def make_scorer(
    config: EvaluateConfig, metrics: Sequence[str], examples: Sequence[EvaluationExample]
) -> Scorer:
    """A scorer of these metrics, with the labels that the references have.

    Raises:
        DataError: a reference without an answer, or with a label that is not in the list.
        ResourceError: a library that is not installed.
    """
    for name in metrics:
        if name in LIBRARIES:
            require_extra(LIBRARIES[name], "evaluate", f"--metrics {name}")
    pattern = None if config.answer_regex is None else re.compile(config.answer_regex)
    bare = Scorer(tuple(metrics), pattern, ())
    answers = [bare.answer(example.reference or "") for example in examples]
    needs_answer = any(name in ANSWER_METRICS for name in metrics)
    for example, answer in zip(examples, answers, strict=True):
        if needs_answer and answer is None:
            text = f"--answer-regex finds no answer in the reference {example.reference!r:.60}"
            raise example.error(text)
    if not {"accuracy", "f1"} & set(metrics):
        return bare
    known = dict.fromkeys(config.labels or [answer.strip() for answer in answers if answer])
    scorer = Scorer(tuple(metrics), pattern, tuple(known))
    for example, answer in zip(examples, answers, strict=True):
        if scorer.canonical_label(answer or "") is None:
            text = f"the label `{answer}` is none of --labels {','.join(config.labels)}"
            raise example.error(text)
    return scorer


def is_same(answer: str, reference: str) -> bool:
    """Whether two texts are equal but for Unicode form, case, blanks and a full stop at the end."""
    return normalize_answer(answer) == normalize_answer(reference)


def as_number(text: str) -> tuple[Decimal, str] | None:
    """The number that a whole text is, and `%` or nothing; None where it is none."""
    match = NUMBER.fullmatch(canonical(text).strip())
    if match is None or (match["sign"] and match["second"]):
        return None
    if match["dollar"] and match["percent"]:
        return None
    number = Decimal(match["digits"].replace(",", ""))
    is_negative = (match["sign"] or match["second"]) in ("-", "\N{MINUS SIGN}")
    return -number if is_negative else number, match["percent"]


def compared_as(answer: str | None, reference: str) -> str | None:
    """How two answers are compared: as `numbers` where both are, as `text`; None without one."""
    if answer is None:
        return None
    return "text" if None in (as_number(answer), as_number(reference)) else "numbers"


def extract(pattern: re.Pattern[str], text: str) -> str | None:
    """The last match of a pattern, of its first group that took part where it has any."""
    matches = list(pattern.finditer(text))
    if not matches:
        return None
    groups = [group for group in matches[-1].groups() if group is not None]
    return str(groups[0] if groups else matches[-1][0])


def word_errors(response: str, reference: str) -> dict[str, int]:
    """Words to change, to add and to leave out, and the words of the reference."""
    import jiwer

    texts = (" ".join(split_words(text)) for text in (reference, response))
    counts = jiwer.process_words(*texts)
    errors = counts.substitutions + counts.deletions + counts.insertions
    words = counts.substitutions + counts.deletions + counts.hits
    return {"word_errors": int(errors), "words": int(words)}

"""Aggregate the rows of an evaluation into its figures.

Most figures are a quotient of two sums over rows: nats by tokens, right answers by answers. Those
can be drawn anew from the same rows (`compare.py`). BLEU, chrF and F1 are of all rows.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from llmctl.evaluate.perplexity import perplexity_of
from llmctl.evaluate.scorers import FORMS, ROUGE
from llmctl.evaluate.task import Row


class Quotient(NamedTuple):
    """A figure that is a sum over rows divided by another."""

    numerator: Callable[[Row], float]
    denominator: Callable[[Row], float]


def _mean(key: str) -> Quotient:
    return Quotient(lambda row: row[key], lambda row: 1.0)


QUOTIENTS: dict[str, Quotient] = {
    "loss": Quotient(lambda row: row["nats"], lambda row: row["tokens"]),
    "bits_per_byte": Quotient(lambda row: row["nats"] / math.log(2), lambda row: row["bytes"]),
    **{name: _mean(name) for name in (*ROUGE, "bleu", "chrf", "exact", "reward")},
    "wer": Quotient(lambda row: row["word_errors"], lambda row: row["words"]),
    "accuracy": _mean("right"),
}
QUOTIENTS_OF = {
    "perplexity": ("loss", "bits_per_byte"),
    "rouge": ROUGE,
    "f1": (),
}
"""Quotients of each metric; its own name where it is not listed."""


def quotient_names(metrics: Sequence[str]) -> list[str]:
    """Names of the quotients among the figures of these metrics."""
    return [name for metric in metrics for name in QUOTIENTS_OF.get(metric, (metric,))]


def compute_figures(rows: Sequence[Row], metrics: Sequence[str]) -> dict[str, Any]:
    """Every figure over these rows."""
    figures: dict[str, Any] = {}
    for name in quotient_names(metrics):
        numerator, denominator = QUOTIENTS[name]
        total = sum(map(denominator, rows))
        figures[name] = math.fsum(map(numerator, rows)) / total if total else math.nan
    if "loss" in figures:
        figures = {"perplexity": perplexity_of(figures["loss"]), **figures}
        figures["tokens"] = sum(row["tokens"] for row in rows)
        figures["bytes"] = sum(row["bytes"] for row in rows)
    if "bleu" in metrics or "chrf" in metrics:
        from sacrebleu.metrics import BLEU, CHRF  # Papineni et al., 2002; Popović, 2015

        for name, kind in (("bleu", BLEU), ("chrf", CHRF)):
            if name in metrics:
                responses, references = (
                    [FORMS[name](row[key]) for row in rows] for key in ("response", "reference")
                )
                score = kind().corpus_score(responses, [references]).score
                figures[name] = float(score)  # over all rows
    if "f1" in metrics:
        figures["f1"] = macro_f1(rows)
    if rows and "named" in rows[0]:
        figures["ambiguous_share"] = sum(len(row["named"]) > 1 for row in rows) / len(rows)
    if rows and "finish_reason" in rows[0]:
        figures["cut_share"] = sum(row["finish_reason"] == "length" for row in rows) / len(rows)
    return figures


def count_comparisons(rows: Sequence[Row]) -> dict[str, int]:
    """Rows whose answers were compared as numbers, and as text; the others have no answer."""
    ways = [row.get("compared", "text") for row in rows]
    return {way: ways.count(way) for way in ("numbers", "text") if way in ways}


def macro_f1(rows: Sequence[Row]) -> float:
    """Mean F1 over the labels of references and predictions, by scikit-learn.

    A response without a label is a miss of the right one and of no other label.
    """
    from sklearn.metrics import f1_score

    references = [row["reference_label"] for row in rows]
    predictions = [row["label"] or "" for row in rows]
    labels = sorted({*references, *predictions} - {""})
    return float(f1_score(references, predictions, labels=labels, average="macro", zero_division=0))

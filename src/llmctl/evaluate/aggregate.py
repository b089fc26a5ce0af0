"""From the rows of an evaluation to its figures.

Most figures are a quotient of two sums over rows: nats by tokens, right answers by answers. Those
can be drawn anew from the same rows (`compare.py`). BLEU, chrF and F1 are of all rows at once.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from llmctl.evaluate.scorers import ROUGE

Row = dict[str, Any]


class Quotient(NamedTuple):
    """A figure as a row gives it: its share of a numerator and of a denominator."""

    above: Callable[[Row], float]
    below: Callable[[Row], float]


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
    """Names of the quotients that these metrics come to."""
    return [name for metric in metrics for name in QUOTIENTS_OF.get(metric, (metric,))]


def figure_names(metrics: Sequence[str]) -> list[str]:
    """Names of all figures of these metrics."""
    more = [metric for metric in metrics if metric in ("perplexity", "f1")]
    return list(dict.fromkeys([*more, *quotient_names(metrics)]))


def compute_figures(rows: Sequence[Row], metrics: Sequence[str]) -> dict[str, Any]:
    """Every figure over these rows."""
    found: dict[str, Any] = {}
    for name in quotient_names(metrics):
        above, below = QUOTIENTS[name]
        total = sum(map(below, rows))
        found[name] = math.fsum(map(above, rows)) / total if total else math.nan
    if "loss" in found:
        found = {"perplexity": math.exp(min(found["loss"], 700)), **found}
        found["tokens"] = sum(row["tokens"] for row in rows)
        found["bytes"] = sum(row["bytes"] for row in rows)
    if "bleu" in metrics or "chrf" in metrics:
        found |= _corpus_scores(rows, metrics)
    if "f1" in metrics:
        found["f1"] = macro_f1(rows)
    if rows and "finish_reason" in rows[0]:
        found["cut_share"] = sum(row["finish_reason"] == "length" for row in rows) / len(rows)
    return found


def _corpus_scores(rows: Sequence[Row], metrics: Sequence[str]) -> dict[str, float]:
    """BLEU (Papineni et al., 2002) and chrF (Popović, 2015) over all rows, by sacrebleu."""
    from sacrebleu.metrics import BLEU, CHRF

    responses, references = ([row[key] for row in rows] for key in ("response", "reference"))
    kinds = {"bleu": BLEU(), "chrf": CHRF()}
    return {
        name: float(kinds[name].corpus_score(responses, [references]).score)
        for name in ("bleu", "chrf")
        if name in metrics
    }


def macro_f1(rows: Sequence[Row]) -> float:
    """Mean over labels of F1, over those that a row has or was given, by scikit-learn.

    A response without a label is a miss of the right one and of no other label.
    """
    from sklearn.metrics import f1_score

    right = [row["reference_label"] for row in rows]
    given = [row["label"] or "" for row in rows]
    labels = sorted({*right, *given} - {""})
    return float(f1_score(right, given, labels=labels, average="macro", zero_division=0))

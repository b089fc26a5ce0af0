"""How good a reward model is, from its scores of pairs that it did not learn from.

In: scores, weights and lengths of N pairs as arrays. Out: figures, each beside what a model that
knows nothing would reach, as JSON and as a table.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmctl.console import log
from llmctl.numbers import counted

Array = NDArray[np.float64]
BINS = 10
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
CONFIDENCE = 1.959964
"""Standard deviations around 95 % of a normal distribution."""
STRONG = 0.5
"""Correlation with length from which on a score says a good deal about length."""


@dataclass(frozen=True)
class PairScores:
    """N pairs with their scores."""

    chosen: Array
    """(N,) scores."""
    rejected: Array
    """(N,) scores."""
    weights: Array
    """(N,) of each pair; a ranking's weigh 1 in total, since they are no independent evidence."""
    chosen_lengths: Array
    """(N,) tokens of the responses."""
    rejected_lengths: Array


def report(scored: PairScores) -> dict[str, Any]:
    """Every figure, by name."""
    count = float(scored.weights.sum())
    right = _wins(scored.chosen - scored.rejected, scored.weights)
    longer = _wins(scored.chosen_lengths - scored.rejected_lengths, scored.weights)
    both = np.concatenate([scored.chosen, scored.rejected])
    lengths = np.concatenate([scored.chosen_lengths, scored.rejected_lengths])
    bins = reliability(scored.chosen - scored.rejected, scored.weights)
    return {
        "pairs": len(scored.chosen),
        "accuracy": right / count,
        "accuracy_interval": wilson(right, count),
        "longer_wins": longer / count,
        "longer_wins_interval": wilson(longer, count),
        "coin_interval": wilson(count / 2, count),
        "margin": float(np.average(scored.chosen - scored.rejected, weights=scored.weights)),
        "calibration_error": calibration_error(bins),
        "reliability": bins,
        "score_mean": float(both.mean()),
        "score_std": float(both.std()),
        "chosen": _distribution(scored.chosen),
        "rejected": _distribution(scored.rejected),
        "length_correlation": spearman(both, lengths),
    }


def reliability(difference: Array, weights: Array) -> list[dict[str, float]]:
    """How often the higher score is right, by how sure the model is of it.

    A pair's confidence is sigmoid(|difference|), between 0.5 and 1; the bins are equally wide.
    """
    sure = 1 / (1 + np.exp(-np.abs(difference)))
    right = np.where(difference == 0, 0.5, difference > 0)
    place = np.minimum(((sure - 0.5) * 2 * BINS).astype(int), BINS - 1)
    rows = []
    for number in range(BINS):
        inside = place == number
        weight = float(weights[inside].sum())
        row = {"from": 0.5 + number / (2 * BINS), "to": 0.5 + (number + 1) / (2 * BINS)}
        if weight:
            row["confidence"] = float(np.average(sure[inside], weights=weights[inside]))
            row["accuracy"] = float(np.average(right[inside], weights=weights[inside]))
        rows.append({**row, "weight": weight})
    return rows


def calibration_error(bins: list[dict[str, float]]) -> float:
    """Expected calibration error (Guo et al., 2017, arXiv:1706.04599, equation 3)."""
    total = sum(row["weight"] for row in bins)
    gaps = (
        row["weight"] * abs(row["accuracy"] - row["confidence"]) for row in bins if row["weight"]
    )
    return sum(gaps) / total


def spearman(one: Array, other: Array) -> float:
    """Correlation of ranks (Spearman, 1904), ties at their mean rank; 0 where one is constant."""
    ranks = [_ranks(values) for values in (one, other)]
    first, second = (rank - rank.mean() for rank in ranks)
    size = math.sqrt(float((first**2).sum() * (second**2).sum()))
    return float((first * second).sum()) / size if size else 0.0


def wilson(right: float, count: float) -> tuple[float, float]:
    """Wilson interval of a proportion at 95 % (Wilson, 1927)."""
    share, square = right / count, CONFIDENCE**2 / count
    middle = (share + square / 2) / (1 + square)
    width = math.sqrt(square * share * (1 - share) + square**2 / 4) / (1 + square)
    return max(0.0, middle - width), min(1.0, middle + width)


def log_report(metrics: dict[str, Any]) -> None:
    """The table on stderr, and warnings where the figures say little for the model."""
    accuracy = f"{metrics['accuracy']:.3f}  ({_interval(metrics['accuracy_interval'])})"
    longer = f"{metrics['longer_wins']:.3f}  ({_interval(metrics['longer_wins_interval'])})"
    rows = {
        "accuracy": accuracy,
        "  the longer response wins": longer,
        "  a coin": f"0.500  ({_interval(metrics['coin_interval'])})",
        "mean difference of scores": f"{metrics['margin']:.3f}",
        "calibration error": f"{metrics['calibration_error']:.3f}",
        "scores of chosen": _spread(metrics["chosen"]),
        "scores of rejected": _spread(metrics["rejected"]),
        "rank correlation with length": f"{metrics['length_correlation']:+.2f}",
    }
    pairs = counted(metrics["pairs"], "held-out pair")
    log.info("on %s (95 %% confidence intervals):", pairs)
    for name, value in rows.items():
        log.info("  %-30s %s", name, value)
    low = metrics["accuracy_interval"][0]
    shortest, longest = metrics["longer_wins_interval"]
    baselines = {
        "a coin": metrics["coin_interval"][1],
        "choosing the longer response": longest,
        "choosing the shorter response": 1 - shortest,
    }
    if close := [name for name, high in baselines.items() if low <= high]:
        what = " or ".join(close)
        log.warning("this model may be no better than %s: the intervals overlap", what)
    correlation = metrics["length_correlation"]
    if abs(correlation) >= STRONG:
        log.warning(
            "scores follow the length of the response (rank correlation %+.2f): a policy trained "
            "with them will write %s ones",
            correlation,
            "longer" if correlation > 0 else "shorter",
        )


def _wins(difference: Array, weights: Array) -> float:
    """Weight of the pairs in which the first is larger; a tie is half a win."""
    return float((weights * ((difference > 0) + 0.5 * (difference == 0))).sum())


def _distribution(scores: Array) -> dict[str, float]:
    quantiles = np.quantile(scores, QUANTILES).tolist()
    named = {f"q{round(100 * at)}": value for at, value in zip(QUANTILES, quantiles, strict=True)}
    return {"mean": float(scores.mean()), "std": float(scores.std()), **named}


def _ranks(values: Array) -> Array:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    mean: Array = (np.cumsum(counts) - (counts - 1) / 2)[places]
    return mean


def _interval(ends: tuple[float, float]) -> str:
    return f"{ends[0]:.3f} to {ends[1]:.3f}"


def _spread(scores: dict[str, float]) -> str:
    return f"{scores['mean']:.3f} ± {scores['std']:.3f}, median {scores['q50']:.3f}"

"""Compare two models on the same rows.

In: the rows of both. Out: differences with the 95 % interval of a paired bootstrap (Efron, 1979;
Koehn, 2004), and the share of prompts on which one is preferred.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmctl.evaluate.aggregate import QUOTIENTS
from llmctl.evaluate.task import Row
from llmctl.training.reward_report import wilson

RESAMPLES = 10_000
AT_ONCE = 1 << 22
"""Drawn counts that are held at a time."""


def differences(
    ours: Sequence[Row], theirs: Sequence[Row], names: Sequence[str], seed: int
) -> dict[str, dict[str, float | None]]:
    """The difference of each named quotient between two models, with its interval.

    The rows of both are on the same data in the same order.
    """
    results = {}
    for name in names:
        numerator, denominator = QUOTIENTS[name]
        sums = [
            np.array([[numerator(row), denominator(row)] for row in rows], dtype=np.float64)
            for rows in (ours, theirs)
        ]
        results[name] = difference(sums[0], sums[1], seed)
    return results


def difference(
    ours: NDArray[np.float64], theirs: NDArray[np.float64], seed: int
) -> dict[str, float | None]:
    """The difference of two quotients of sums, and its interval where there are rows to draw from.

    Both are numerators and denominators (N, 2), row by row of the same data.
    """
    both = np.concatenate([ours, theirs], axis=1)
    whole = _difference(both.sum(0))
    if len(both) < 2:
        return {"difference": float(whole), "low": None, "high": None}
    draws = np.random.default_rng(seed)
    size = max(1, AT_ONCE // len(both))
    probabilities = np.full(len(both), 1 / len(both))
    resampled = [
        _difference(
            draws.multinomial(len(both), probabilities, min(size, RESAMPLES - start)) @ both
        )
        for start in range(0, RESAMPLES, size)
    ]
    low, high = np.nanquantile(np.concatenate(resampled), (0.025, 0.975))
    return {"difference": float(whole), "low": float(low), "high": float(high)}


def _difference(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Difference of quotients from sums (…, 4): first / second - third / fourth."""
    with np.errstate(invalid="ignore", divide="ignore"):
        quotients: NDArray[np.float64] = sums[..., ::2] / sums[..., 1::2]
    return quotients[..., 0] - quotients[..., 1]


def win_rate(ours: Sequence[Row], theirs: Sequence[Row]) -> dict[str, float]:
    """Share of the prompts whose response the reward model scores higher; a tie is half a win."""
    pairs = [(our["reward"], their["reward"]) for our, their in zip(ours, theirs, strict=True)]
    wins = sum(1.0 if our > their else 0.5 if our == their else 0.0 for our, their in pairs)
    low, high = wilson(wins, len(pairs))
    return {"win_rate": wins / len(pairs), "win_rate_low": low, "win_rate_high": high}


def sum_by_document(rows: Sequence[Row]) -> list[Row]:
    """Sum the rows of each document into one."""
    summed: dict[int, dict[str, Any]] = {}
    for row in rows:
        whole = summed.setdefault(row["document"], {"nats": 0.0, "tokens": 0, "bytes": 0})
        for key in whole:
            whole[key] += row[key]
    return list(summed.values())


def pair_rows(ours: Sequence[Row], theirs: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Rows that stand for the same text: documents, or the parts of a single one."""
    if not ours or "document" not in ours[0]:
        return list(ours), list(theirs)
    our_documents, their_documents = sum_by_document(ours), sum_by_document(theirs)
    same = [row["tokens"] for row in ours] == [row["tokens"] for row in theirs]
    if len(our_documents) == 1 and same:
        return list(ours), list(theirs)
    return our_documents, their_documents

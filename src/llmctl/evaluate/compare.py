"""Two models on the same rows: how they differ, and how sure that is.

In: the rows of both. Out: differences with the 95 % interval of a pair_rows bootstrap (Efron, 1979;
Koehn, 2004), and the share of prompts on which one is preferred.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmctl.evaluate.aggregate import QUOTIENTS, Row
from llmctl.training.reward_report import wilson

RESAMPLES = 10_000
AT_ONCE = 1 << 22
"""Drawn counts that are held at a time."""


def differences(
    ours: Sequence[Row], theirs: Sequence[Row], names: Sequence[str], seed: int
) -> dict[str, dict[str, float | None]]:
    """Of each quotient: what it is for the one less what it is for the other, and its interval.

    Args:
        ours: rows of the one model.
        theirs: rows of the other, on the same data in the same order.
        names: of the quotients.
        seed: of the bootstrap.
    """
    found = {}
    for name in names:
        above, below = QUOTIENTS[name]
        parts = [
            np.array([[above(row), below(row)] for row in rows], dtype=np.float64)
            for rows in (ours, theirs)
        ]
        found[name] = difference(parts[0], parts[1], seed)
    return found


def difference(
    ours: NDArray[np.float64], theirs: NDArray[np.float64], seed: int
) -> dict[str, float | None]:
    """The difference of two quotients of sums, and its interval where there are rows to draw from.

    Args:
        ours: (N, 2) numerators and denominators of the one.
        theirs: (N, 2) of the other, row by row of the same data.
        seed: of the bootstrap.
    """
    both = np.concatenate([ours, theirs], axis=1)
    whole = _difference(both.sum(0))
    if len(both) < 2:
        return {"difference": float(whole), "low": None, "high": None}
    draws = np.random.default_rng(seed)
    size = max(1, AT_ONCE // len(both))
    shares = np.full(len(both), 1 / len(both))
    drawn = [
        _difference(draws.multinomial(len(both), shares, min(size, RESAMPLES - start)) @ both)
        for start in range(0, RESAMPLES, size)
    ]
    low, high = np.nanquantile(np.concatenate(drawn), (0.025, 0.975))
    return {"difference": float(whole), "low": float(low), "high": float(high)}


def _difference(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of (…, 4) sums: the first over the second less the third over the fourth."""
    with np.errstate(invalid="ignore", divide="ignore"):
        quotients: NDArray[np.float64] = sums[..., ::2] / sums[..., 1::2]
    return quotients[..., 0] - quotients[..., 1]


def win_rate(ours: Sequence[Row], theirs: Sequence[Row]) -> dict[str, float]:
    """Share of the prompts whose response the reward model scores higher; a tie is half a win."""
    pairs = [(one["reward"], other["reward"]) for one, other in zip(ours, theirs, strict=True)]
    wins = sum(1.0 if one > other else 0.5 if one == other else 0.0 for one, other in pairs)
    low, high = wilson(wins, len(pairs))
    return {"win_rate": wins / len(pairs), "win_rate_low": low, "win_rate_high": high}


def sum_by_document(rows: Sequence[Row]) -> list[Row]:
    """The parts of each document as one row."""
    summed: dict[int, dict[str, Any]] = {}
    for row in rows:
        whole = summed.setdefault(row["document"], {"nats": 0.0, "tokens": 0, "bytes": 0})
        for key in whole:
            whole[key] += row[key]
    return list(summed.values())


def pair_rows(ours: Sequence[Row], theirs: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """RowLog that stand for the same text: documents; the parts of a single one, where they are."""
    if not ours or "document" not in ours[0]:
        return list(ours), list(theirs)
    one, other = sum_by_document(ours), sum_by_document(theirs)
    same = [row["tokens"] for row in ours] == [row["tokens"] for row in theirs]
    return (list(ours), list(theirs)) if len(one) == 1 and same else (one, other)

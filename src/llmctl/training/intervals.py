"""How sure a share is that was counted."""

import math

CONFIDENCE = 1.959964
"""Standard deviations around 95 % of a normal distribution."""


def wilson(right: float, count: float) -> tuple[float, float]:
    """The 95 % confidence interval of a share (Wilson, 1927)."""
    share, square = right / count, CONFIDENCE**2 / count
    middle = (share + square / 2) / (1 + square)
    width = math.sqrt(square * share * (1 - share) + square**2 / 4) / (1 + square)
    return max(0.0, middle - width), min(1.0, middle + width)

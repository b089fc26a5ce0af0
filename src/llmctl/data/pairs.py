"""Preferences as tokens: the chosen and the rejected sequence of each pair, and what it weighs.

In: `Preference` objects and how a model reads them. Out: `Pairs` of flat arrays. A pair that is too
long loses the beginning of its prompt, the same tokens on both sides, and never any of a response.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from llmctl.data.preference_rows import Preference
from llmctl.data.responses import ResponseFormat
from llmctl.data.tokenized import Encoded, Tokenized, collect
from llmctl.errors import DataError, ModelError

MOST_DROPPED = 0.2
"""Share of the pairs that `--truncation auto` leaves out without being asked."""


@dataclass(frozen=True)
class Pairs:
    """N pairs of sequences, whose trained tokens are those of the response."""

    chosen: Tokenized
    rejected: Tokenized
    margins: NDArray[np.float32]
    """(N,) by how much the chosen one is better, 0 where nothing says so."""
    weights: NDArray[np.float32]
    """(N,) of each pair in the loss."""
    numbers: NDArray[np.int64]
    """(N,) which preference each was made of."""
    cut: int
    """Pairs whose prompts lost their beginning."""
    dropped: int
    """Pairs left out for their length."""

    def __len__(self) -> int:
        """N."""
        return len(self.numbers)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(N,) tokens of the longer side of each."""
        return np.maximum(self.chosen.lengths, self.rejected.lengths)

    def digest(self) -> str:
        """Hex sha256 of all that decides what is learned from them."""
        found = hashlib.sha256((self.chosen.digest() + self.rejected.digest()).encode())
        for part in (self.margins, self.weights):
            found.update(part.tobytes())
        return found.hexdigest()

    def without_margins(self) -> "Pairs":
        """The same, whatever the rows say of margins."""
        return replace(self, margins=np.zeros_like(self.margins))


def encode_pairs(
    written: ResponseFormat,
    preferences: Sequence[Preference],
    max_length: int,
    truncation: Literal["auto", "cut", "drop"],
) -> Pairs:
    """Encode every pair that fits, or that fits without the beginning of its prompt.

    Raises:
        DataError: none is left, or more than a fifth too long where that was not asked for.
        ModelError: the chat template refuses a conversation, with its file and line.
    """
    sides: list[tuple[Encoded, Encoded]] = []
    numbers, cut = [], 0
    for number, preference in enumerate(preferences):
        whole = _encoded(written, preference)
        excess = max(len(side.tokens) for side in whole) - max_length
        found: tuple[Encoded | None, ...] = whole
        if excess > 0:
            shorter = truncation != "drop"
            found = tuple(written.shortened(side, excess) if shorter else None for side in whole)
        one, other = found
        if one is None or other is None:
            continue
        cut += excess > 0
        sides.append((one, other))
        numbers.append(number)
    dropped = len(preferences) - len(sides)
    _require_enough(len(preferences), dropped, max_length, truncation)
    kept = [preferences[number] for number in numbers]
    return Pairs(
        collect([one] for one, _ in sides),
        collect([other] for _, other in sides),
        np.array([pair.margin or 0.0 for pair in kept], np.float32),
        np.array([pair.weight for pair in kept], np.float32),
        np.array(numbers, np.int64),
        cut,
        dropped,
    )


def _encoded(written: ResponseFormat, preference: Preference) -> tuple[Encoded, Encoded]:
    chosen, rejected = preference.sides
    try:
        return (
            written.example(chosen, preference.shared),
            written.example(rejected, preference.shared),
        )
    except ModelError as error:
        raise ModelError(
            error.message, file=chosen.place, line=chosen.line, hint=error.hint
        ) from None


def _require_enough(count: int, dropped: int, max_length: int, truncation: str) -> None:
    if dropped == count > 0:
        raise DataError(
            f"every pair has more than {max_length:,} tokens: none is left",
            hint="raise --max-length",
        )
    if truncation == "auto" and dropped > MOST_DROPPED * count:
        raise DataError(
            f"{dropped:,} of {count:,} pairs have responses that do not fit into {max_length:,} "
            "tokens",
            hint="raise --max-length, or leave them out: --truncation drop",
        )

"""Tokenized examples: flat arrays of sequences, their loss mask, and bins to pack them.

In: encoded sequences, as of `chat/render.py`. Out: flat arrays, so that millions of examples cost
their tokens and little more; the longest sequence that a model takes.

Packing is best-fit decreasing (Johnson, 1973): the longest first, each into the fullest bin that
still has room for it. Never more than 11/9 of the fewest bins possible, and in practice nearly all
slots full (Ding et al., 2024, arXiv:2404.10830).
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from llmctl.errors import UserError
from llmctl.models.loading import context_size

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SHORTEST = 8
"""Positions that virtual tokens must leave for the text."""
LONGEST = 2048
"""Tokens of a sequence at most, where the model takes more and no length was given."""


class EncodedSequence(NamedTuple):
    """One training sequence."""

    tokens: list[int]
    trained: list[bool]
    """For each token, whether it counts in the loss; the first never does, having no past."""
    ends: bool
    """Whether its last trained token is one that ends a turn or a text."""


@dataclass(frozen=True)
class FlatTokens:
    """N sequences of T tokens in all."""

    tokens: NDArray[np.int32]
    """(T,) ids, one sequence after the other."""
    starts: NDArray[np.int64]
    """(N + 1,) where each sequence begins, and where the last one ends."""

    def __len__(self) -> int:
        """N."""
        return len(self.starts) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(N,) tokens of each sequence."""
        return np.diff(self.starts)


@dataclass(frozen=True)
class Tokenized(FlatTokens):
    """Sequences to train on."""

    trained: NDArray[np.bool_]
    """(T,) whether a token counts in the loss."""
    full_lengths: NDArray[np.int64]
    """(N,) tokens of each before any cut."""
    ends: NDArray[np.bool_]
    """(N,) whether its last trained token ended a turn or a text, before any cut."""
    rows: NDArray[np.int64]
    """(N,) number of the example that each was made of; several may be made of one."""

    @property
    def cut(self) -> NDArray[np.bool_]:
        """(N,) whether a sequence lost its end."""
        return self.full_lengths > self.lengths

    @property
    def trained_counts(self) -> NDArray[np.int64]:
        """(N,) tokens of each sequence that count in the loss."""
        total = np.concatenate([[0], np.cumsum(self.trained)])
        counts: NDArray[np.int64] = total[self.starts[1:]] - total[self.starts[:-1]]
        return counts

    def sequence(self, number: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Tokens of one sequence, and whether each is trained on."""
        span = slice(self.starts[number], self.starts[number + 1])
        return self.tokens[span], self.trained[span]

    def sequence_of(self, token: int) -> int:
        """Number of the sequence that has the token of this place."""
        return int(np.searchsorted(self.starts, token, side="right") - 1)

    def digest(self) -> str:
        """Hex sha256 of all that training depends on."""
        digest = hashlib.sha256()
        for part in (self.tokens, self.trained, self.starts):
            digest.update(np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()

    def select(self, kept: NDArray[np.bool_] | NDArray[np.int64]) -> Tokenized:
        """Select sequences by a mask (N,) or by their numbers, in that order."""
        numbers = np.flatnonzero(kept) if kept.dtype == np.bool_ else kept
        lengths = self.lengths[numbers]
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        within = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)
        places = np.repeat(self.starts[numbers], lengths) + within
        return Tokenized(
            self.tokens[places],
            starts,
            self.trained[places],
            self.full_lengths[numbers],
            self.ends[numbers],
            self.rows[numbers],
        )

    def truncated(self, max_length: int, truncation: Literal["cut", "drop"]) -> Tokenized:
        """Cut sequences at `max_length` tokens, or leave out the longer ones."""
        if truncation == "drop":
            return self.select(self.full_lengths <= max_length)
        if not len(self) or self.lengths.max() <= max_length:
            return self
        within = np.arange(len(self.tokens)) - np.repeat(self.starts[:-1], self.lengths)
        kept = within < max_length
        lengths = np.minimum(self.lengths, max_length)
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return replace(self, tokens=self.tokens[kept], trained=self.trained[kept], starts=starts)


def collect(examples: Iterable[Iterable[EncodedSequence]]) -> Tokenized:
    """Collect the sequences of all examples in order; an example may give several, or none."""
    tokens: list[NDArray[np.int32]] = []
    trained: list[NDArray[np.bool_]] = []
    ends, rows = [], []
    for row, sequences in enumerate(examples):
        for sequence in sequences:
            tokens.append(np.asarray(sequence.tokens, dtype=np.int32))
            trained.append(np.asarray(sequence.trained, dtype=np.bool_))
            ends.append(sequence.ends)
            rows.append(row)
    lengths = np.array([len(ids) for ids in tokens], dtype=np.int64)
    return Tokenized(
        np.concatenate([np.zeros(0, np.int32), *tokens]),
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        np.concatenate([np.zeros(0, np.bool_), *trained]),
        lengths,
        np.array(ends, dtype=np.bool_),
        np.array(rows, dtype=np.int64),
    )


def pack(lengths: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    """Pack sequences into bins: the numbers of those in each, longest first.

    None of the lengths (N,) is above `size`, the tokens that a bin holds.

    Returns:
        The bins, the fullest kinds first; the same for the same lengths.
    """
    order = np.argsort(-lengths, kind="stable")
    bins: list[list[int]] = []
    with_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # ascending, each once
    for number, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        place = bisect_left(rooms, length)
        if place == len(rooms):
            chosen, room = len(bins), size
            bins.append([])
        else:
            room = rooms[place]
            chosen = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[place]
        bins[chosen].append(number)
        left = room - length
        if left > 0:
            if left not in with_room:
                with_room[left] = []
                insort(rooms, left)
            with_room[left].append(chosen)
    return [np.array(numbers, dtype=np.int64) for numbers in bins]


def resolve_max_length(
    wanted: int | None,
    config: PreTrainedConfig,
    reserved: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> int:
    """Resolve `--max-length`: tokens of a sequence at most.

    Not given it is what the model takes, at most 2,048. Virtual tokens take `reserved` positions. A
    `tokenizer` limits it too, where an encoder has fewer positions than its config says.

    Raises:
        UserError: more than the model has positions for.
    """
    context = context_size(config)
    positions = LONGEST if context is None else context
    if tokenizer is not None:
        positions = min(positions, int(tokenizer.model_max_length))
    most = positions if context is None else positions - reserved
    if reserved and most < SHORTEST:
        raise UserError(f"--prompt-tuning {reserved:,}: the model has {positions:,} positions")
    if wanted is not None and context is not None and wanted > most:
        taken = f", of which virtual tokens take {reserved}" if reserved else ""
        raise UserError(f"--max-length {wanted:,}: the model has {positions:,} positions{taken}")
    return wanted or min(most, LONGEST)

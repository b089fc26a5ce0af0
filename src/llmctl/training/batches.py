"""Which tokens make which batch: a pure function of seed, step and rank, so resume is exact."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from llmctl.errors import DataError

if TYPE_CHECKING:
    from llmctl.data.shards import TokenSplit

IGNORED = -100
"""Target of a position that does not count."""


class Batches:
    """Training windows of T + 1 tokens, reshuffled and shifted every epoch."""

    def __init__(self, split: "TokenSplit", context: int, seed: int) -> None:
        """Cut the split into windows that overlap by one token.

        Raises:
            DataError: the split is shorter than one window.
        """
        if split.tokens < context + 1:
            raise DataError(
                f"the corpus has {split.tokens:,} training tokens, fewer than one sequence of "
                f"{context + 1:,}",
                hint="use more text or a smaller --context",
            )
        self.split, self.context, self.seed = split, context, seed
        self.windows = max(1, (split.tokens - context) // context)
        self._slack = min(split.tokens - 1 - self.windows * context, context - 1)
        self._orders: dict[int, np.ndarray] = {}

    def starts(self, first: int, count: int) -> np.ndarray:
        """First tokens of the windows number first to first + count of the whole run."""
        numbers = np.arange(first, first + count)
        epochs, places = numbers // self.windows, numbers % self.windows
        order = {int(epoch): self._order(int(epoch)) for epoch in np.unique(epochs)}
        self._orders = order
        return np.array([order[int(e)][p] for e, p in zip(epochs, places, strict=True)])

    def batch(self, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets, both (count, T), of the windows from number `first` on."""
        rows = self.split.windows(self.starts(first, count), self.context + 1)
        tokens = torch.from_numpy(rows)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            random = np.random.default_rng((self.seed, epoch))
            shift = int(random.integers(0, self._slack + 1))
            self._orders[epoch] = random.permutation(self.windows) * self.context + shift
        return self._orders[epoch]


def validation_batches(
    split: "TokenSplit", context: int, batch_size: int, limit: int, rank: int = 0, world: int = 1
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and targets over the split in order; every token but the first is a target once.

    Every rank yields as many batches, as sharded models need; what would be counted twice has its
    targets masked.

    Args:
        split: the validation split.
        context: T.
        batch_size: B.
        limit: about how many targets to visit, spread evenly; 0 visits all.
        rank: this process takes every world-th batch, starting here.
        world: number of processes.

    Yields:
        (B, T) pairs; targets are IGNORED where not counted. The last window may be shorter.
    """
    full = (split.tokens - 1) // context
    starts = np.arange(full) * context
    partial = (split.tokens - 1) % context
    if limit and full * context > limit:
        starts = starts[np.linspace(0, full - 1, max(1, limit // context)).astype(int)]
        partial = 0
    groups = [starts[i : i + batch_size] for i in range(0, len(starts), batch_size)]
    for first in range(0, len(groups), world):
        mine = first + rank
        yield _pair(split, groups[min(mine, len(groups) - 1)], context, counts=mine < len(groups))
    if partial:
        yield _pair(split, np.array([full * context]), partial, counts=rank == 0)


def _pair(
    split: "TokenSplit", starts: np.ndarray, length: int, *, counts: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.from_numpy(split.windows(starts, length + 1))
    targets = tokens[:, 1:] if counts else torch.full_like(tokens[:, 1:], IGNORED)
    return tokens[:, :-1].contiguous(), targets.contiguous()

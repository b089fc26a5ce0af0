"""Which examples make which micro-batch: a pure function of seed and place, so resume is exact.

`datasets`' and Trainer's own samplers draw from the global generators, and are not where they were
after a resumed epoch.
"""

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, Sampler

from llmctl.errors import DataError, UserError

STRETCH = 50
"""Steps whose examples are sorted by length together: enough to find alike ones, and to mix."""
OTHER_IDS = ("token_type_ids", "mm_token_type_ids", "position_ids")
"""Columns that are named like token ids, and stand beside them."""


class Order(Sampler[list[int]]):
    """Indices of every micro-batch of one rank, from the run's first step to its last.

    Epochs follow each other without a seam: every batch is full, and a step takes the same examples
    whether they come in one pass, in several, or on several ranks.
    """

    def __init__(
        self,
        size: int,
        *,
        batch_size: int,
        grad_accum: int = 1,
        rank: int = 0,
        world: int = 1,
        steps: int,
        seed: int,
        lengths: Sequence[int] | None = None,
    ) -> None:
        """Set the terms.

        Args:
            size: number of examples, N.
            batch_size: examples of a micro-batch on one rank.
            grad_accum: micro-batches of a step.
            rank: whose micro-batches to yield.
            world: number of ranks.
            steps: steps of the run.
            seed: decides the order.
            lengths: of the N examples, to put alike ones into one step; None to mix freely.
        """
        if not size:
            raise DataError("there are no training examples")
        self.size, self.batch_size, self.grad_accum = size, batch_size, grad_accum
        self.rank, self.world, self.steps, self.seed = rank, world, steps, seed
        self.lengths = None if lengths is None else np.asarray(lengths)
        self.per_step = batch_size * grad_accum * world
        self._epochs: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        """Micro-batches of the run."""
        return self.steps * self.grad_accum

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the examples of one micro-batch after the other."""
        return (self.batch(number) for number in range(len(self)))

    def batch(self, number: int) -> list[int]:
        """Examples of micro-batch `number` on this rank, counted from 0."""
        first = (number * self.world + self.rank) * self.batch_size
        return self._examples(first, self.batch_size)

    def step(self, number: int) -> list[int]:
        """Examples of step `number` on all ranks."""
        return self._examples(number * self.per_step, self.per_step)

    def _examples(self, first: int, many: int) -> list[int]:
        places = range(first, first + many)
        needed = {place // self.size for place in places}
        self._epochs = {epoch: self._epoch(epoch) for epoch in needed}
        return [int(self._epochs[p // self.size][p % self.size]) for p in places]

    def _epoch(self, epoch: int) -> np.ndarray:
        """The order of the examples in one epoch, (N,)."""
        if epoch in self._epochs:
            return self._epochs[epoch]
        random = np.random.default_rng((self.seed, epoch))
        mixed = random.permutation(self.size)
        if self.lengths is None:
            return mixed
        rest = min(-epoch * self.size % self.per_step, self.size)  # of a step begun in the last one
        body = mixed[rest:]
        stretch = STRETCH * self.per_step
        alike = [self._by_length(body[i : i + stretch]) for i in range(0, len(body), stretch)]
        whole = np.concatenate([mixed[:0], *alike])
        full = len(whole) // self.per_step * self.per_step
        steps = whole[:full].reshape(-1, self.per_step)
        return np.concatenate([mixed[:rest], random.permutation(steps).reshape(-1), whole[full:]])

    def _by_length(self, examples: np.ndarray) -> np.ndarray:
        assert self.lengths is not None
        return examples[np.argsort(self.lengths[examples], kind="stable")]


class Stream(IterableDataset[Any]):
    """One rank's examples of a streamed data set, epoch after epoch without an end.

    The data set's own shuffling is a function of its seed and epoch; a resumed run reads again what
    it has read, which is exact, and costs no forward pass.
    """

    def __init__(self, dataset: Any, batch_size: int, rank: int = 0, world: int = 1) -> None:
        """Take every world-th batch of a `datasets.IterableDataset`, starting with batch `rank`."""
        self.dataset, self.batch_size, self.rank, self.world = dataset, batch_size, rank, world

    def __iter__(self) -> Iterator[Any]:
        """Yield examples."""
        place = 0
        for epoch in count():
            self.dataset.set_epoch(epoch)
            before = place
            for example in self.dataset:
                if place // self.batch_size % self.world == self.rank:
                    yield example
                place += 1
            if place == before:
                raise DataError("there are no training examples")


def token_lengths(dataset: Any) -> list[int]:
    """Tokens of each example: its `length`, or else over all of its texts.

    TRL has prompts, answers, and answers refused.

    Raises:
        UserError: the data set has no column of token ids.
    """
    columns = getattr(dataset, "column_names", None) or ()
    if "length" in columns:
        return [int(length) for length in dataset["length"]]
    names = [name for name in columns if name.endswith("_ids") and name not in OTHER_IDS]
    if not names:
        raise UserError(
            "--group-by-length needs token ids to count, and this data has none",
            hint="leave it out; what is tokenized batch by batch, as images are, cannot be grouped",
        )
    texts = [[len(ids) for ids in dataset[name]] for name in names]
    return [sum(lengths) for lengths in zip(*texts, strict=True)]

"""Which examples make which micro-batch: a pure function of seed, step and rank.

So resume is exact. In: shards of tokens, or rows. Out: micro-batches on the CPU, with what each
weighs in the loss and how many tokens it has as numbers, which wait for no device.

`datasets`' own samplers draw from the global generators, and are not where they were after a
resumed epoch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmctl.data.tokenized import Tokenized, pack
from llmctl.errors import DataError

if TYPE_CHECKING:
    from llmctl.data.shards import TokenSplit

IGNORED = -100
"""Target of a position that does not count."""
STRETCH = 50
"""Steps whose examples are sorted by length together: enough to find alike ones, and to mix."""
NAMED = 8
"""Examples that a message names."""

Batch = dict[str, Any]
"""Tensors by name; `weight` and `tokens` are numbers."""


class Rows(Protocol):
    """Rows to train on: sequences, texts or pairs."""

    lengths: list[int]
    """(N,) tokens of each."""
    weights: NDArray[np.float64]
    """(N,) what each weighs in the loss."""

    def __len__(self) -> int:
        """N."""

    def batch(self, numbers: Sequence[int]) -> Batch:
        """Batch of the rows that have these numbers, on the CPU."""


class Batches(Protocol):
    """Micro-batches of a run."""

    def step(self, number: int) -> list[Batch]:
        """This process's micro-batches of step `number`, counted from 0, on the CPU."""

    def step_weight(self, number: int) -> float:
        """Weight of a step's micro-batches of all processes together."""

    def name(self, number: int) -> str:
        """Which examples a step is computed from, for messages."""


class Order:
    """Numbers of the examples of every micro-batch of one rank, without an end.

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
        seed: int,
        lengths: Sequence[int] | None = None,
    ) -> None:
        """Set what decides the order.

        Of `size` examples, `batch_size` make a micro-batch on one rank, and `grad_accum` of these a
        step. `lengths` (N,) put alike ones into one step; None mixes freely.

        Raises:
            DataError: there are no examples.
        """
        if not size:
            raise DataError("there are no training examples")
        self.size, self.batch_size, self.grad_accum = size, batch_size, grad_accum
        self.rank, self.world, self.seed = rank, world, seed
        self.lengths = None if lengths is None else np.asarray(lengths)
        self.per_step = batch_size * grad_accum * world
        self._epochs: dict[int, np.ndarray] = {}

    def batch(self, number: int) -> list[int]:
        """Examples of micro-batch `number` on this rank, counted from 0."""
        first = (number * self.world + self.rank) * self.batch_size
        return self._examples(first, self.batch_size)

    def step(self, number: int) -> list[int]:
        """Examples of step `number` on all ranks."""
        return self._examples(number * self.per_step, self.per_step)

    def _examples(self, first: int, count: int) -> list[int]:
        places = range(first, first + count)
        needed = {place // self.size for place in places}
        self._epochs = {epoch: self._epoch(epoch) for epoch in needed}
        return [int(self._epochs[p // self.size][p % self.size]) for p in places]

    def _epoch(self, epoch: int) -> np.ndarray:
        """Order of the examples in one epoch, (N,)."""
        if epoch in self._epochs:
            return self._epochs[epoch]
        random = np.random.default_rng((self.seed, epoch))
        mixed = random.permutation(self.size)
        if self.lengths is None:
            return mixed
        rest = min(-epoch * self.size % self.per_step, self.size)  # of a step begun in the last one
        body = mixed[rest:]
        stretch = STRETCH * self.per_step
        parts = [body[i : i + stretch] for i in range(0, len(body), stretch)]
        alike = [part[np.argsort(self.lengths[part], kind="stable")] for part in parts]
        whole = np.concatenate([mixed[:0], *alike])
        full = len(whole) // self.per_step * self.per_step
        steps = whole[:full].reshape(-1, self.per_step)
        return np.concatenate([mixed[:rest], random.permutation(steps).reshape(-1), whole[full:]])


@dataclass(frozen=True)
class RowBatches:
    """Micro-batches of rows in an order."""

    rows: Rows
    order: Order

    def step(self, number: int) -> list[Batch]:
        """This process's micro-batches of a step."""
        first = number * self.order.grad_accum
        return [self.rows.batch(self.order.batch(first + i)) for i in range(self.order.grad_accum)]

    def step_weight(self, number: int) -> float:
        """Weight of the rows of a step, on all processes."""
        return float(self.rows.weights[self.order.step(number)].sum())

    def name(self, number: int) -> str:
        """Name the first few examples of a step, and how many more there are."""
        examples = self.order.step(number)
        rest = f" and {len(examples) - NAMED:,} more" if len(examples) > NAMED else ""
        return "examples " + ", ".join(map(str, examples[:NAMED])) + rest


class SequenceRows:
    """N rows, each one sequence, or several packed into at most `size` tokens.

    Attention is causal, so padding at the right needs no mask: nothing looks at it, and no label
    stands on it.
    """

    def __init__(self, data: Tokenized, pad: int, size: int | None = None) -> None:
        """Arrange the sequences; `pad` fills the rest of a row, `size` packs."""
        self.data, self.pad, self.is_packed = data, pad, size is not None
        bins = None if size is None else pack(data.lengths, size)
        self._numbers = np.arange(len(data)) if bins is None else np.concatenate([*bins, []])
        sizes = np.ones(len(data), np.int64) if bins is None else list(map(len, bins))
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        ordered = self._numbers.astype(np.int64)
        self.lengths: list[int] = self._over_rows(data.lengths[ordered]).tolist()
        """(N,) tokens of each row."""
        self.weights = self._over_rows(data.trained_counts[ordered]).astype(np.float64)
        """(N,) tokens of each row that count in the loss."""

    def __len__(self) -> int:
        """N."""
        return len(self._starts) - 1

    def row(self, number: int) -> NDArray[np.int64]:
        """Which sequences a row holds."""
        return self._numbers[self._starts[number] : self._starts[number + 1]].astype(np.int64)

    def batch(self, numbers: Sequence[int]) -> Batch:
        """`input_ids` and `labels` (B, L), `places` (N,), `weight`, `tokens`; packed also
        `position_ids`.

        A place is where a token is predicted that counts, in B x (L - 1); `weight` is how many
        there are, and `tokens` counts those that are no padding.
        A position of 0 begins a sequence, and transformers lets none look beyond its own beginning.
        Padding is a sequence of its own.
        """
        parts = [[self.data.sequence(n) for n in self.row(number)] for number in numbers]
        length = max(sum(len(ids) for ids, _ in row) for row in parts)
        shape = (len(parts), length)
        ids = np.full(shape, self.pad, dtype=np.int64)
        labels = np.full(shape, IGNORED, dtype=np.int64)
        positions = np.zeros(shape, dtype=np.int64)
        counted = 0
        for place, row in enumerate(parts):
            at = 0
            for tokens, trained in row:
                end = at + len(tokens)
                ids[place, at:end] = tokens
                labels[place, at:end] = np.where(trained, tokens, IGNORED)
                positions[place, at:end] = np.arange(len(tokens))
                at = end
            positions[place, at:] = np.arange(length - at)
            counted += at
        batch: Batch = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}
        if self.is_packed:
            batch["position_ids"] = torch.from_numpy(positions)
        batch["places"] = (batch["labels"][:, 1:] != IGNORED).flatten().nonzero()[:, 0]
        batch["weight"] = len(batch["places"])
        batch["tokens"] = counted
        return batch

    def _over_rows(self, counts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Sums over the sequences of each row, (N,), of a count of each sequence."""
        total = np.concatenate([[0], np.cumsum(counts)])
        return np.diff(total[self._starts]).astype(np.int64)


class Windows:
    """Training windows of T + 1 tokens, reshuffled and shifted every epoch."""

    def __init__(self, split: "TokenSplit", context: int, seed: int) -> None:
        """Cut windows that overlap by a token; raise a DataError if the split has none."""
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

    def batch(self, first: int, count: int) -> Batch:
        """`input_ids` and `targets`, both (count, T), of the windows from number `first` on."""
        return _window_batch(self.split.windows(self.starts(first, count), self.context + 1))

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            random = np.random.default_rng((self.seed, epoch))
            shift = int(random.integers(0, self._slack + 1))
            self._orders[epoch] = random.permutation(self.windows) * self.context + shift
        return self._orders[epoch]


@dataclass(frozen=True)
class WindowBatches:
    """Micro-batches of windows."""

    windows: Windows
    batch_size: int
    grad_accum: int
    rank: int
    world: int

    @property
    def per_step(self) -> int:
        """Windows of a step, on all processes."""
        return self.batch_size * self.grad_accum * self.world

    def step(self, number: int) -> list[Batch]:
        """This process's micro-batches of a step."""
        first = number * self.per_step + self.rank * self.batch_size
        stride = self.batch_size * self.world
        return [
            self.windows.batch(first + i * stride, self.batch_size) for i in range(self.grad_accum)
        ]

    def step_weight(self, number: int) -> float:
        """Tokens of a step: every one of them is trained on."""
        return self.per_step * self.windows.context

    def name(self, number: int) -> str:
        """Name the sequences of the run that a step is computed from."""
        first = number * self.per_step
        return f"sequences {first:,} to {first + self.per_step - 1:,}"


def validation_windows(
    split: "TokenSplit", context: int, batch_size: int, limit: int, rank: int = 0, world: int = 1
) -> Iterator[tuple[Batch, bool]]:
    """Windows over the split in order; every token but the first is a target once.

    About `limit` targets are visited, spread evenly; 0 visits all. A process takes every world-th
    batch, from number `rank` on.

    Yields:
        Batches as `Windows` makes them, and whether each counts: every rank yields as many, as
        sharded models need. The last window may be shorter.
    """
    full, partial = divmod(split.tokens - 1, context)
    starts = np.arange(full) * context
    if limit and full * context > limit:
        starts = starts[np.linspace(0, full - 1, max(1, limit // context)).astype(int)]
        partial = 0
    groups = [starts[i : i + batch_size] for i in range(0, len(starts), batch_size)]
    for first in range(0, len(groups), world):
        mine = first + rank
        tokens = split.windows(groups[min(mine, len(groups) - 1)], context + 1)
        yield _window_batch(tokens), mine < len(groups)
    if partial:
        tokens = split.windows(np.array([full * context]), partial + 1)
        yield _window_batch(tokens), rank == 0


def validation_sizes(split: "TokenSplit", context: int, limit: int) -> list[int]:
    """Targets of each window that `validation_windows` yields under this limit, over all ranks."""
    full, partial = divmod(split.tokens - 1, context)
    if limit and full * context > limit:
        return [context] * max(1, limit // context)
    return [context] * full + [partial] * bool(partial)


def validation_shares(
    lengths: Sequence[int], size: int, rank: int, world: int
) -> list[tuple[list[int], bool]]:
    """A rank's rows in batches of like length, each row on one rank.

    Every rank gets as many batches, as sharded models need: what is left over is the shortest row
    once more, which does not count.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    mine = order[rank::world]
    shares = [(mine[i : i + size], True) for i in range(0, len(mine), size)]
    most = -(-len(order[::world]) // size)
    return [*shares, *[(order[:1], False)] * (most - len(shares))]


def on_device(batch: Batch, device: str | torch.device) -> Batch:
    """Move a batch to the device; to a GPU from pinned memory, without waiting."""
    return {
        name: _moved(value, torch.device(device)) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _window_batch(rows: NDArray[np.int64]) -> Batch:
    tokens = torch.from_numpy(rows)
    targets = tokens[:, 1:]
    count = targets.numel()
    return {
        "input_ids": tokens[:, :-1].contiguous(),
        "targets": targets.contiguous(),
        "weight": count,
        "tokens": count,
    }

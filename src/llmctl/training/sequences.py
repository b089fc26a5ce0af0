"""Batches of training sequences: padded, or several in a row that do not see each other.

In: `Tokenized` arrays. Out: (B, L) tensors. Attention is causal, so padding at the right needs no
mask: nothing looks at it, and no label stands on it.
"""

from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmctl.data.packing import pack
from llmctl.data.tokenized import Tokenized
from llmctl.training.batches import IGNORED

datasets.disable_progress_bars()


class Rows:
    """N rows, each one sequence, or several packed into at most `size` tokens."""

    def __init__(self, data: Tokenized, pad: int, size: int | None = None) -> None:
        """Arrange the sequences; `pad` fills the rest of a row, `size` packs."""
        self.data, self.pad, self.is_packed = data, pad, size is not None
        bins = None if size is None else pack(data.lengths, size)
        self._numbers = np.arange(len(data)) if bins is None else np.concatenate([*bins, []])
        sizes = np.ones(len(data), np.int64) if bins is None else list(map(len, bins))
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        total = np.concatenate([[0], np.cumsum(data.lengths[self._numbers.astype(np.int64)])])
        self.lengths: list[int] = np.diff(total[self._starts]).astype(int).tolist()
        """(N,) tokens of each row."""

    def __len__(self) -> int:
        """N."""
        return len(self._starts) - 1

    def row(self, number: int) -> NDArray[np.int64]:
        """Which sequences a row holds."""
        return self._numbers[self._starts[number] : self._starts[number + 1]].astype(np.int64)

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The batch of rows that have these numbers: what Trainer's collator does."""
        return self.batch([example["row"] for example in examples])

    def batch(self, numbers: Sequence[int]) -> dict[str, Any]:
        """`input_ids` and `labels` (B, L), `places` (N,), `tokens`; packed also `position_ids`.

        A place is where a token is predicted that counts, in B x (L - 1); `tokens` counts those
        that are no padding, and is known without waiting for a GPU.
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
        batch: dict[str, Any] = {
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
        }
        if self.is_packed:
            batch["position_ids"] = torch.from_numpy(positions)
        batch["places"] = (batch["labels"][:, 1:] != IGNORED).flatten().nonzero()[:, 0]
        batch["tokens"] = counted
        return batch


def numbered(lengths: Sequence[int]) -> datasets.Dataset:
    """What Trainer takes for data: the numbers of the rows, which a collator looks up."""
    return datasets.Dataset.from_dict({"row": list(range(len(lengths))), "length": list(lengths)})


def shares(lengths: Sequence[int], size: int, rank: int, world: int) -> list[list[int]]:
    """A rank's rows in batches of like length, each row on one rank."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)[rank::world]
    return [order[i : i + size] for i in range(0, len(order), size)]


def on_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch where the model is."""
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}

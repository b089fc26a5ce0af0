"""Batches of training sequences: padded, or several in a row that do not see each other.

In: `Tokenized` arrays. Out: (B, L) tensors. Attention is causal, so padding at the right needs no
mask: nothing looks at it, and no label stands on it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmctl.data.packing import pack
from llmctl.data.tokenized import Tokenized
from llmctl.training.head import IGNORED


class Rows:
    """N rows, each one sequence, or several packed into at most `size` tokens."""

    def __init__(self, data: Tokenized, pad: int, size: int | None = None) -> None:
        """Arrange the sequences; `pad` fills the rest of a row, `size` packs."""
        self.data, self.pad, self.is_packed = data, pad, size is not None
        self.rows: list[NDArray[np.int64]] = (
            list(np.arange(len(data))[:, None]) if size is None else pack(data.lengths, size)
        )

    def __len__(self) -> int:
        """N."""
        return len(self.rows)

    @property
    def lengths(self) -> list[int]:
        """(N,) tokens of each row."""
        lengths = self.data.lengths
        return [int(lengths[row].sum()) for row in self.rows]

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """The batch of rows that have these numbers: what Trainer's collator does."""
        return self.batch([example["row"] for example in examples])

    def batch(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """`input_ids`, `labels` and `tokens` (a count); packed also `position_ids`.

        A position of 0 begins a sequence, and transformers lets none look beyond its own beginning.
        Padding is a sequence of its own.
        """
        parts = [[self.data.sequence(n) for n in self.rows[number]] for number in numbers]
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
        batch = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}
        if self.is_packed:
            batch["position_ids"] = torch.from_numpy(positions)
        batch["tokens"] = torch.tensor(counted)
        return batch

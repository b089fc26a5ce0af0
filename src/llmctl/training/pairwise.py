"""Batches of pairs, and the loss of a reward model over them.

The chosen halves of a batch come first, the rejected ones after them, in one forward pass.
"""

from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from llmctl.data.pairs import Pairs
from llmctl.data.tokenized import Encoded
from llmctl.scoring import score_batch

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
"""What the model is given of a batch."""


class PairBatches:
    """N pairs as (2B, L) tensors, padded at the right."""

    def __init__(self, pairs: Pairs, pad: int, *, takes_types: bool) -> None:
        """Take the pairs; `pad` fills the rest of a row."""
        self.pairs, self.pad, self.takes_types = pairs, pad, takes_types

    def __len__(self) -> int:
        """N."""
        return len(self.pairs)

    def as_dataset(self) -> datasets.Dataset:
        """What Trainer takes for data: the numbers of the pairs, which `collate` looks up."""
        numbers = list(range(len(self)))
        return datasets.Dataset.from_dict({"row": numbers, "length": self.pairs.lengths.tolist()})

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """The batch of the pairs that have these numbers: what Trainer's collator does."""
        return self.batch([example["row"] for example in examples])

    def texts(self, number: int) -> tuple[Encoded, Encoded]:
        """The chosen and the rejected text of a pair."""
        chosen, rejected = (
            Encoded(tokens.tolist(), trained.tolist(), True)
            for tokens, trained in (
                self.pairs.chosen.sequence(number),
                self.pairs.rejected.sequence(number),
            )
        )
        return chosen, rejected

    def batch(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """The model's inputs (2B, L), `margin` and `weight` (B,), and `tokens` (a count)."""
        pairs = [self.texts(number) for number in numbers]
        texts = [chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs]
        batch = score_batch(texts, self.pad, self.takes_types)
        batch["margin"] = torch.from_numpy(self.pairs.margins[list(numbers)])
        batch["weight"] = torch.from_numpy(self.pairs.weights[list(numbers)])
        batch["tokens"] = batch["attention_mask"].sum()
        return batch

    def shares(self, size: int, rank: int = 0, world: int = 1) -> list[list[int]]:
        """A rank's pairs in batches of like length, each pair on one rank."""
        order = np.argsort(self.pairs.lengths, kind="stable")[rank::world].tolist()
        return [order[i : i + size] for i in range(0, len(order), size)]


def pair_scores(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Scores of the chosen and of the rejected texts, (B,) each, in float32."""
    inputs = {name: batch[name] for name in INPUTS if name in batch}
    chosen, rejected = model(**inputs).logits[:, 0].float().chunk(2)
    return chosen, rejected


def preference_loss(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | float = 0.0,
    weight: Tensor | float = 1.0,
    center: float = 0.0,
) -> Tensor:
    """Summed loss of pairs under the model of Bradley and Terry (1952).

    Each pair's is -log sigmoid(chosen - rejected - margin) (Ouyang et al., 2022, arXiv:2203.02155,
    equation 1; with the margin Touvron et al., 2023, arXiv:2307.09288, equation 2), and
    center * (chosen + rejected)^2 (Eisenstein et al., 2023, arXiv:2312.09244).

    Args:
        chosen: (B,) scores.
        rejected: (B,) scores.
        margin: (B,) by how much they should differ at least.
        weight: (B,) of each pair.
        center: of the second part.
    """
    loss = -logsigmoid(chosen - rejected - margin)
    if center:
        loss = loss + center * (chosen + rejected).square()
    return (weight * loss).sum()

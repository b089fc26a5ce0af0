"""Direct preference optimisation as functions of log-probabilities, and batches of pairs.

A batch of B pairs is 2B sequences in one forward pass: the chosen ones, then the rejected ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from llmctl.data.pairs import Pairs
from llmctl.data.tokenized import Tokenized
from llmctl.training.batches import IGNORED
from llmctl.training.head import scored
from llmctl.training.sequences import Rows

OURS = ("numbers", "weights", "counts")
"""What a batch of pairs has beside a batch of rows."""
FALLS = 3
FALLEN = -0.05
"""Measurements in a row, and nats a token, after which chosen responses have grown unlikely."""


@dataclass(frozen=True)
class Objective:
    """The loss of a pair."""

    loss: Literal["sigmoid", "ipo"]
    beta: float
    label_smoothing: float = 0.0

    def rewards(self, gains: Tensor, counts: Tensor) -> Tensor:
        """Implicit rewards: beta times what the loss compares.

        That is log pi(y|x) - log pi_ref(y|x), summed over the tokens of a response for sigmoid
        (Rafailov et al., 2023, arXiv:2305.18290, section 5.1). For ipo it is their mean: the paper
        does not speak of lengths, and its authors told TRL's that their results are of the mean.

        Args:
            gains: log pi - log pi_ref of whole responses.
            counts: tokens of each, of the same shape.
        """
        compared = gains / counts.clamp_min(1) if self.loss == "ipo" else gains
        return self.beta * compared

    def losses(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """The loss of each pair from its rewards, of any shape.

        sigmoid: -(1 - e) log sigmoid(m) - e log sigmoid(-m) for the margin m and label smoothing e.
        At e = 0 this is DPO's (Rafailov et al., 2023, arXiv:2305.18290, equation 7), else the
        conservative one (Mitchell, 2023, A note on DPO with noisy preferences, equation 3).
        ipo: (m / beta - 1 / (2 beta))^2 (Azar et al., 2023, arXiv:2310.12036, equation 17).
        """
        margin = chosen - rejected
        if self.loss == "ipo":
            return (margin / self.beta - 1 / (2 * self.beta)).square()
        right = -(1 - self.label_smoothing) * logsigmoid(margin)
        return right - self.label_smoothing * logsigmoid(-margin)


class PairRows:
    """N pairs as batches of sequences, padded at the right."""

    def __init__(self, pairs: Pairs, pad: int) -> None:
        """Take the pairs; `pad` fills the rest of a row."""
        self._rows = Rows(_one_after_the_other(pairs.chosen, pairs.rejected), pad)
        self._weights = torch.from_numpy(pairs.weights)
        self.lengths: list[int] = pairs.lengths.tolist()
        """(N,) tokens of the longer side of each."""

    def __len__(self) -> int:
        """N."""
        return len(self.lengths)

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The batch of the pairs that have these numbers: what Trainer's collator does."""
        return self.batch([example["row"] for example in examples])

    def batch(self, numbers: Sequence[int]) -> dict[str, Any]:
        """What `Rows` makes of the 2B sequences, `counts` (2B,) of their tokens that count, and
        `numbers` and `weights` (B,) of the pairs.
        """
        batch = self._rows.batch([*numbers, *(len(self) + number for number in numbers)])
        batch["counts"] = (batch["labels"][:, 1:] != IGNORED).sum(1)
        batch["numbers"] = torch.tensor(list(numbers))
        batch["weights"] = self._weights[batch["numbers"]]
        return batch


def log_probabilities(
    model: nn.Module, head: nn.Module, batch: dict[str, Any], *, chunked: bool
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each response given its prompt, (2B,) in float64.

    Returns:
        It, and the balancing loss of a mixture of experts.
    """
    rows = {name: value for name, value in batch.items() if name not in OURS}
    found = scored(model, head, rows, chunked=chunked)
    count, length = batch["labels"].shape
    # places differ, so nothing is added in an order that varies, as index_add does on a GPU
    spread = found.losses.new_zeros(count * (length - 1)).index_put(
        (batch["places"],), found.losses
    )
    return -spread.view(count, -1).double().sum(1), found.balance


def is_displaced(gains: Sequence[float]) -> bool:
    """Whether the chosen responses have grown less likely for some time.

    The loss sees the difference of two responses alone, and both may fall (Razin et al., 2024,
    arXiv:2410.08847).

    Args:
        gains: of the chosen ones over the reference, in nats a token, one after another.
    """
    last = gains[-FALLS - 1 :]
    falls = len(last) > FALLS and all(after < before for before, after in pairwise(last))
    return falls and last[-1] < FALLEN


def without_dropout(model: nn.Module) -> None:
    """Switch off dropout where it is a number that attention is called with, as in LLaMA.

    TRL switches off the layers of dropout. With any of it two passes of one model differ, and the
    implicit reward would be noise.
    """
    for module in model.modules():
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _one_after_the_other(first: Tokenized, second: Tokenized) -> Tokenized:
    """The sequences of both."""
    return Tokenized(
        np.concatenate([first.tokens, second.tokens]),
        np.concatenate([first.trained, second.trained]),
        np.concatenate([first.starts, first.starts[-1] + second.starts[1:]]),
        np.concatenate([first.full_lengths, second.full_lengths]),
        np.concatenate([first.ends, second.ends]),
        np.concatenate([first.rows, second.rows]),
    )

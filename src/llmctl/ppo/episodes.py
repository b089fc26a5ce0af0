"""Episodes as tensors: what was asked and answered, and what is known of each token of an answer.

A rank holds B episodes. (B, R) tensors are padded at the right to the longest answer; `mask` says
which tokens there are. Sequences of tokens are cut into passes of like length.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sequences:
    """B prompts with their responses, as token ids."""

    prompts: list[list[int]]
    responses: list[list[int]]
    """With the token that ended each."""

    def __len__(self) -> int:
        """B."""
        return len(self.prompts)

    def mask(self, width: int | None = None) -> Tensor:
        """(B, R) true on the tokens of each response."""
        lengths = torch.tensor([len(response) for response in self.responses])
        longest = int(lengths.max()) if width is None else width
        return torch.arange(longest) < lengths[:, None]


@dataclass(frozen=True)
class Pass:
    """Some rows of the episodes, as a model takes them."""

    rows: Tensor
    """(b,) their numbers."""
    tokens: Tensor
    """(b, L) prompts and responses, padded at the right: attention is causal, nothing sees it."""
    places: Tensor
    """(n,) of b x (L - 1): after which token each token of a response is chosen."""
    chosen: Tensor
    """(n,) tokens of the responses, row by row."""
    mask: Tensor
    """(b, R) which of the episodes' columns they are."""

    def spread(self, values: Tensor) -> Tensor:
        """Values (n,) of the tokens as (b, R), 0 where there is none."""
        return values.new_zeros(self.mask.shape).masked_scatter(self.mask, values)


def passes(
    sequences: Sequences,
    rows: Sequence[int],
    *,
    most_tokens: int,
    most_chosen: int,
    mask: Tensor,
    device: torch.device,
) -> Iterator[Pass]:
    """Cut rows into passes: those of like length together, each within both limits.

    Args:
        sequences: all of this rank's.
        rows: which of them.
        most_tokens: of a pass, padding included; one row is always taken.
        most_chosen: response tokens of a pass, of each of which there are V logits.
        mask: (B, R) of the episodes, on the CPU: to look at it on a GPU would be a wait.
        device: where to.
    """
    length = {row: len(sequences.prompts[row]) + len(sequences.responses[row]) for row in rows}
    group: list[int] = []
    for row in sorted(rows, key=lambda row: (-length[row], row)):
        longest = length[group[0]] if group else 0
        chosen = sum(len(sequences.responses[r]) for r in (*group, row))
        if group and ((len(group) + 1) * longest > most_tokens or chosen > most_chosen):
            yield make_pass(sequences, group, mask, device)
            group = []
        group.append(row)
    if group:
        yield make_pass(sequences, group, mask, device)


def make_pass(
    sequences: Sequences, rows: Sequence[int], mask: Tensor, device: torch.device, pad: int = 0
) -> Pass:
    """These rows as one pass; what `pad` is makes no difference."""
    whole = [sequences.prompts[row] + sequences.responses[row] for row in rows]
    longest = max(map(len, whole))
    padded = [tokens + [pad] * (longest - len(tokens)) for tokens in whole]
    places = [
        number * (longest - 1) + len(sequences.prompts[row]) - 1 + i
        for number, row in enumerate(rows)
        for i in range(len(sequences.responses[row]))
    ]
    chosen = [token for row in rows for token in sequences.responses[row]]
    parts = (
        torch.tensor(rows),
        torch.tensor(padded),
        torch.tensor(places),
        torch.tensor(chosen),
        mask[list(rows)],
    )
    if device.type == "cuda":
        return Pass(*(part.pin_memory().to(device, non_blocking=True) for part in parts))
    return Pass(*(part.to(device) for part in parts))


@dataclass(frozen=True)
class Episodes:
    """A step's episodes of one rank, with all that their updates need; on the device."""

    sequences: Sequences
    first: int
    """Number of the first of them among those of all ranks."""
    mask: Tensor
    """(B, R), on the CPU."""
    log_probs: Tensor
    """(B, R) of the sampled tokens, under the policy that sampled them."""
    values: Tensor
    """(B, R) of the state before each token."""
    advantages: Tensor
    """(B, R)."""
    returns: Tensor
    """(B, R)."""
    sampled: Tensor
    """(B, R) log-probabilities as the sampler gave them."""

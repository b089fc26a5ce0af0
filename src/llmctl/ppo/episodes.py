"""Episodes as tensors: the token ids of prompts and responses in, batches of like length and the
experience that updates need out.

A rank holds B episodes. (B, R) tensors are padded at the right to the longest response; `mask` says
which tokens there are.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class EpisodeTokens:
    """B prompts with their responses, as token ids."""

    prompts: list[list[int]]
    responses: list[list[int]]
    """With the token that ended each."""

    def __len__(self) -> int:
        """B."""
        return len(self.prompts)

    def mask(self) -> Tensor:
        """(B, R) true on the tokens of each response."""
        lengths = torch.tensor([len(response) for response in self.responses])
        return torch.arange(int(lengths.max())) < lengths[:, None]


@dataclass(frozen=True)
class Pass:
    """Rows of the episodes that go through a model together."""

    rows: Tensor
    """(b,) their indices."""
    tokens: Tensor
    """(b, L) prompts and responses, padded at the right: attention is causal, nothing sees it."""
    positions: Tensor
    """(n,) indices into b x (L - 1) of the tokens that predict the response tokens."""
    targets: Tensor
    """(n,) tokens of the responses, row by row."""
    mask: Tensor
    """(b, R) the episodes' columns that they fill."""

    def unflatten(self, values: Tensor) -> Tensor:
        """Values (n,) of the response tokens as (b, R), 0 where there is none."""
        return values.new_zeros(self.mask.shape).masked_scatter(self.mask, values)


def make_passes(
    sequences: EpisodeTokens,
    rows: Sequence[int],
    *,
    max_tokens: int,
    max_response_tokens: int,
    mask: Tensor,
    device: torch.device,
) -> Iterator[Pass]:
    """Cut rows into passes: those of like length together, each within both limits.

    A pass has at most `max_tokens`, padding included, and `max_response_tokens`, each with V
    logits; one row is always taken. `mask` (B, R) is on the CPU: reading it on a GPU would
    synchronize.
    """
    length = {row: len(sequences.prompts[row]) + len(sequences.responses[row]) for row in rows}
    group: list[int] = []
    for row in sorted(rows, key=lambda row: (-length[row], row)):
        longest = length[group[0]] if group else 0
        response_tokens = sum(len(sequences.responses[r]) for r in (*group, row))
        too_long = (len(group) + 1) * longest > max_tokens
        if group and (too_long or response_tokens > max_response_tokens):
            yield make_pass(sequences, group, mask, device)
            group = []
        group.append(row)
    if group:
        yield make_pass(sequences, group, mask, device)


def make_pass(
    sequences: EpisodeTokens,
    rows: Sequence[int],
    mask: Tensor,
    device: torch.device,
    pad: int = 0,
) -> Pass:
    """Put rows into one pass; the padding token makes no difference."""
    texts = [sequences.prompts[row] + sequences.responses[row] for row in rows]
    longest = max(map(len, texts))
    padded = [tokens + [pad] * (longest - len(tokens)) for tokens in texts]
    positions = [
        index * (longest - 1) + len(sequences.prompts[row]) - 1 + i
        for index, row in enumerate(rows)
        for i in range(len(sequences.responses[row]))
    ]
    targets = [token for row in rows for token in sequences.responses[row]]
    tensors = (
        torch.tensor(rows),
        torch.tensor(padded),
        torch.tensor(positions),
        torch.tensor(targets),
        mask[list(rows)],
    )
    if device.type == "cuda":
        return Pass(*(tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors))
    return Pass(*(tensor.to(device) for tensor in tensors))


@dataclass(frozen=True)
class Experience:
    """One rank's episodes of a step, with all that the updates need; on the device."""

    sequences: EpisodeTokens
    first: int
    """Index of the first episode among those of all ranks."""
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
    sampler_log_probs: Tensor
    """(B, R) as the sampler computed them."""

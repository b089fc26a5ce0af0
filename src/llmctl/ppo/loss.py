"""PPO's losses on (B, R) tensors, as sums over tokens: the caller divides by a minibatch's tokens.

Sums, since a minibatch may come in several pieces, on several processes, of rows of any length;
each token then counts the same.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class PolicyLoss(NamedTuple):
    """Sums over the mask."""

    loss: Tensor
    clipped: Tensor
    """Tokens at which the clipped term was the larger one; without gradients."""
    kl: Tensor
    """k3 estimate of KL(old || new), in nats; without gradients."""


class ValueLoss(NamedTuple):
    """Sums over the mask."""

    loss: Tensor
    clipped: Tensor


def policy_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, clip: float
) -> PolicyLoss:
    """The clipped surrogate, negated (Schulman et al., 2017, arXiv:1707.06347, eq. 7).

    Args:
        log_probs: (B, R) under the policy that learns.
        old_log_probs: (B, R) under the policy that sampled.
        advantages: (B, R).
        mask: (B, R) tokens that count.
        clip: epsilon.
    """
    log_ratio = (log_probs - old_log_probs).where(mask, 0.0)
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    limited = -advantages * ratio.clamp(1 - clip, 1 + clip)
    with torch.no_grad():
        clipped = ((limited > plain) & mask).sum()
        kl = (ratio - 1 - log_ratio).where(mask, 0.0).sum()
    return PolicyLoss(torch.maximum(plain, limited).where(mask, 0.0).sum(), clipped, kl)


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float
) -> ValueLoss:
    """Half the squared error of the values, of the worse of two (Schulman et al., 2017, code).

    The second is the value held within `clip` of what it was when the batch was sampled.

    Args:
        values: (B, R) that learn.
        old_values: (B, R) of when the batch was sampled.
        returns: (B, R) targets.
        mask: (B, R) tokens that count.
        clip: epsilon of the values; infinity does not clip.
    """
    held = torch.minimum(torch.maximum(values, old_values - clip), old_values + clip)
    plain, limited = (values - returns) ** 2, (held - returns) ** 2
    clipped = ((limited > plain) & mask).sum()
    return ValueLoss(0.5 * torch.maximum(plain, limited).where(mask, 0.0).sum(), clipped)

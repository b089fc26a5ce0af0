"""From scores and log-probabilities to rewards per token, advantages and returns.

Tensors are (B, R): B episodes of at most R response tokens. `mask` is true on sampled tokens up to
and including the one that ended the response; what stands elsewhere changes nothing.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

KlEstimator = Literal["k1", "k3"]
Sum = Callable[[Tensor], Tensor]
"""Sums a tensor over all processes."""


def alone(found: Tensor) -> Tensor:
    """The sum over all processes where there is one."""
    return found


def masked_mean(values: Tensor, mask: Tensor, total: Sum = alone) -> Tensor:
    """The mean of values (B, R) over the mask, of all processes."""
    sums = torch.stack([values.where(mask, 0.0).double().sum(), mask.double().sum()])
    sums = total(sums)
    return (sums[0] / sums[1]).to(values.dtype)


def whiten(values: Tensor, mask: Tensor, total: Sum = alone) -> Tensor:
    """Values (B, R) of mean 0 and variance 1 over the mask, of all processes; 0 elsewhere.

    The variance is the population's. Engstrom et al. (2020, arXiv:2005.12729) count this among what
    makes PPO work.
    """
    mean = masked_mean(values, mask, total)
    variance = masked_mean((values - mean) ** 2, mask, total)
    return ((values - mean) * torch.rsqrt(variance + 1e-8)).where(mask, 0.0)


def kl_penalty(log_probs: Tensor, reference: Tensor, estimator: KlEstimator) -> Tensor:
    """Estimates (B, R) of KL(policy || reference) from a token sampled by the policy.

    k1 = log p - log q is unbiased and may be negative; k3 = exp(-k1) - 1 + k1 never is, and varies
    less (Schulman, 2020, Approximating KL Divergence).

    Args:
        log_probs: log p (B, R) of the sampled tokens under the policy.
        reference: log q (B, R) of them under the reference.
        estimator: k1 or k3.
    """
    k1 = log_probs - reference
    return k1 if estimator == "k1" else torch.expm1(-k1) + k1


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Rewards (B, R): minus the penalty at every token, plus the score at the last.

    Ziegler et al. (2019, arXiv:1909.08593, eq. 2); the score stands on the token that ended the
    response, its EOS where it has one.

    Args:
        scores: (B,) of whole responses.
        kl: (B, R) see `kl_penalty`.
        mask: (B, R); a row without a token gets no score.
        kl_coef: beta.
    """
    rewards = (-kl_coef * kl).where(mask, 0.0)
    lengths = mask.sum(1)
    at = (lengths - 1).clamp(min=0)[:, None]
    earned = scores.to(rewards).where(lengths > 0, 0.0)
    return rewards.scatter_add(1, at, earned[:, None])


def generalized_advantages(
    rewards: Tensor, values: Tensor, next_values: Tensor, discounts: Tensor, lam: float
) -> Tensor:
    """Generalized advantage estimates (B, R) (Schulman et al., 2016, arXiv:1506.02438, eq. 16).

    A_t = delta_t + discount_t lam A_{t+1}, where delta_t = r_t + discount_t V_{t+1} - V_t.

    Args:
        rewards: r (B, R).
        values: V_t (B, R).
        next_values: V_{t+1} (B, R), after each step.
        discounts: gamma (B, R); 0 where an episode ends with the step.
        lam: lambda, from 0 (one step) to 1 (the whole return).
    """
    deltas = rewards + discounts * next_values - values
    carry, decay = torch.zeros_like(deltas[:, 0]), discounts * lam
    found = []
    for t in reversed(range(deltas.shape[1])):
        carry = deltas[:, t] + decay[:, t] * carry
        found.append(carry)
    return torch.stack(found[::-1], 1)


def response_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns, both (B, R) and 0 outside the mask, of responses that end with it.

    Args:
        rewards: (B, R) see `token_rewards`.
        values: V (B, R) of the state before each token.
        mask: (B, R).
        gamma: discount per token.
        lam: see `generalized_advantages`.
    """
    rewards, values = rewards.where(mask, 0.0), values.where(mask, 0.0)
    following = torch.nn.functional.pad(values[:, 1:], (0, 1))
    goes_on = torch.nn.functional.pad(mask[:, 1:], (0, 1))
    advantages = generalized_advantages(
        rewards, values, following, gamma * goes_on.to(rewards.dtype), lam
    )
    advantages = advantages.where(mask, 0.0)
    return advantages, (advantages + values).where(mask, 0.0)


def adapt_kl_coef(kl_coef: float, kl: float, target: float, episodes: int, horizon: float) -> float:
    """The coefficient after a batch whose mean KL per response was `kl`, in nats.

    Proportional control in log space (Ziegler et al., 2019, arXiv:1909.08593, section 2.2).

    Args:
        kl_coef: beta so far.
        kl: of the batch.
        target: what it should be.
        episodes: of the batch.
        horizon: episodes in which a large error moves beta by a factor of about e^0.2.
    """
    error = min(0.2, max(-0.2, kl / target - 1))
    return kl_coef * (1 + error * episodes / horizon)

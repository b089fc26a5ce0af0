"""The mathematics of a rollout: scores and log-probabilities in, token rewards, advantages and
returns out.

Tensors are (B, R): B episodes of at most R response tokens. `mask` is true on sampled tokens up to
and including the one that ended the response; values elsewhere change nothing.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

KlEstimator = Literal["k1", "k3"]
AllReduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all processes."""


def single_process(tensor: Tensor) -> Tensor:
    """Return the tensor: its sum over all processes where there is one."""
    return tensor


def masked_mean(values: Tensor, mask: Tensor, all_reduce: AllReduce = single_process) -> Tensor:
    """Mean of values (B, R) over the mask, of all processes."""
    sums = torch.stack([values.where(mask, 0.0).double().sum(), mask.double().sum()])
    sums = all_reduce(sums)
    return (sums[0] / sums[1]).to(values.dtype)


def whiten(values: Tensor, mask: Tensor, all_reduce: AllReduce = single_process) -> Tensor:
    """Values (B, R) of mean 0 and variance 1 over the mask, of all processes; 0 elsewhere.

    (A - mean) / sqrt(variance + 1e-8), the variance that of the population. Here over all tokens of
    a step, as TRL's PPOTrainer did; a minibatch at a time in Huang et al. (2022, The 37
    Implementation Details of Proximal Policy Optimization, detail 7).
    """
    mean = masked_mean(values, mask, all_reduce)
    variance = masked_mean((values - mean) ** 2, mask, all_reduce)
    return ((values - mean) * torch.rsqrt(variance + 1e-8)).where(mask, 0.0)


def kl_penalty(log_probs: Tensor, reference: Tensor, estimator: KlEstimator) -> Tensor:
    """Estimates (B, R) of KL(p || q), p the policy that sampled the tokens, q the reference.

    k1 = log p - log q is unbiased and may be negative. k3 = q/p - 1 - log(q/p) = exp(-k1) - 1 + k1
    is unbiased too, never negative, and varies less (Schulman, 2020, Approximating KL Divergence,
    http://joschu.net/blog/kl-approx.html).

    Args:
        log_probs: log p (B, R) of the sampled tokens under the policy.
        reference: log q (B, R) of them under the reference.
        estimator: k1 or k3.
    """
    k1 = log_probs - reference
    return k1 if estimator == "k1" else torch.expm1(-k1) + k1


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Rewards (B, R): r_t = -beta KL_t, plus the score at the last token of a response.

    Their sum with k1 is R(x, y) = r(x, y) - beta log(p(y|x) / q(y|x)) (Ziegler et al., 2019,
    arXiv:1909.08593, eq. 2); a penalty at each token as in Ouyang et al. (2022, arXiv:2203.02155,
    section 3.5). The score falls on the token that ended the response, its EOS where it has one.

    Args:
        scores: r (B,) of whole responses.
        kl: (B, R) see `kl_penalty`.
        mask: (B, R); a row without a token gets no score.
        kl_coef: beta.
    """
    rewards = (-kl_coef * kl).where(mask, 0.0)
    lengths = mask.sum(1)
    last = (lengths - 1).clamp(min=0)[:, None]
    scores = scores.to(rewards).where(lengths > 0, 0.0)
    return rewards.scatter_add(1, last, scores[:, None])


def generalized_advantages(
    rewards: Tensor, values: Tensor, next_values: Tensor, discounts: Tensor, lam: float
) -> Tensor:
    """Generalized advantage estimates (B, R) (Schulman et al., 2016, arXiv:1506.02438, eq. 16).

    A_t = sum_l (gamma lam)^l delta_{t+l}, computed as A_t = delta_t + gamma lam A_{t+1}, where
    delta_t = r_t + gamma V_{t+1} - V_t.

    Args:
        rewards: r (B, R).
        values: V_t (B, R).
        next_values: V_{t+1} (B, R), after each step.
        discounts: gamma (B, R); 0 where an episode ends with the step.
        lam: lambda, from 0 (one step) to 1 (the whole return).
    """
    deltas = rewards + discounts * next_values - values
    advantage, decay = torch.zeros_like(deltas[:, 0]), discounts * lam
    advantages = []
    for t in reversed(range(deltas.shape[1])):
        advantage = deltas[:, t] + decay[:, t] * advantage
        advantages.append(advantage)
    return torch.stack(advantages[::-1], 1)


def response_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Advantages A and returns A + V, both (B, R) and 0 outside the mask.

    A response ends with its mask: V is 0 after its last token. A_t + V_t is the lambda-return, the
    target of the value model.

    Args:
        rewards: (B, R) see `token_rewards`.
        values: V (B, R) of the state before each token.
        mask: (B, R).
        gamma: discount per token.
        lam: see `generalized_advantages`.
    """
    rewards, values = rewards.where(mask, 0.0), values.where(mask, 0.0)
    next_values = torch.nn.functional.pad(values[:, 1:], (0, 1))
    continues = torch.nn.functional.pad(mask[:, 1:], (0, 1))
    advantages = generalized_advantages(
        rewards, values, next_values, gamma * continues.to(rewards.dtype), lam
    )
    advantages = advantages.where(mask, 0.0)
    return advantages, (advantages + values).where(mask, 0.0)


def adapt_kl_coef(kl_coef: float, kl: float, target: float, episodes: int, horizon: float) -> float:
    """Coefficient beta after a batch, by proportional control in log space.

    e = clip(KL / target - 1, -0.2, 0.2), beta <- beta (1 + K e) (Ziegler et al., 2019,
    arXiv:1909.08593, section 2.2), with K = episodes / horizon as in their code. The KL is a mean
    over responses, in nats; in `horizon` episodes a clipped error moves beta by about e^0.2.
    """
    error = min(0.2, max(-0.2, kl / target - 1))
    return kl_coef * (1 + error * episodes / horizon)

"""Update policy and value model: several epochs over a step's experience, in minibatches.

In: a `PpoTrainer` and an `Experience`. Out: new weights, and the losses in `trainer.metrics`. A
minibatch is a function of seed, step and epoch, over the episodes of all processes; a loss is a sum
over tokens divided by those of the whole minibatch. So it makes no difference in how many passes,
or on how many processes, a minibatch is computed. The losses take (B, R) tensors.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llmctl.ppo.episodes import Experience, Pass
from llmctl.ppo.models import entropy_from_logits
from llmctl.ppo.trainer import PpoTrainer
from llmctl.signals import StopFlag
from llmctl.training.fault_tolerance import StepOutcome
from llmctl.training.loop import update

SUMS = ("policy_loss", "value_loss", "clipped", "value_clipped", "policy_kl")


@dataclass
class LossSums:
    """Sums over the tokens of updates, kept on the device so that none is waited for."""

    sums: Tensor
    """In the order of SUMS."""
    tokens: int = 0
    updates: int = 0
    last_kl: float = 0.0
    """KL of the last minibatch, in nats a token."""

    def means(self) -> dict[str, float]:
        """Means over the tokens of all updates, by the names of metrics."""
        means = dict(zip(SUMS, (self.sums / self.tokens).tolist(), strict=True))
        means["clip_fraction"] = means.pop("clipped")
        means["value_clip_fraction"] = means.pop("value_clipped")
        return {**means, "updates": self.updates}


def update_models(trainer: PpoTrainer, experience: Experience, flag: StopFlag) -> StepOutcome:
    """Train policy and value model on a step's experience; the outcome on all of it. Collective.

    Raises:
        DivergedError: a loss or a gradient is not finite, and the run is to stop at that.
    """
    started = time.perf_counter()
    lengths = trainer.all_gather([len(r) for r in experience.sequences.responses])
    device = trainer.actor_critic.device
    losses = LossSums(torch.zeros(len(SUMS), dtype=torch.float64, device=device))
    outcome: StepOutcome | None = None
    for rows in minibatches(trainer, len(lengths)):
        tokens = int(lengths[torch.as_tensor(rows)].sum())
        loss = backpropagate(trainer, experience, rows, tokens, losses)
        outcome = _step(trainer, loss, flag)
        if trainer.config.stop_kl and losses.last_kl > trainer.config.stop_kl:
            break
    assert outcome is not None
    means = losses.means()
    trainer.metrics |= means
    trainer.metrics["update_seconds"] = round(time.perf_counter() - started, 4)
    loss = outcome.loss.new_tensor(
        means["policy_loss"] + trainer.config.value_coef * means["value_loss"]
    )
    return replace(outcome, loss=loss, tokens=trainer.metrics["response_tokens"])


def minibatches(trainer: PpoTrainer, episodes: int) -> Iterator[Sequence[int]]:
    """Indices, among the episodes of all processes, of each minibatch in order."""
    step = trainer.state.progress.step
    for epoch in range(trainer.ppo.ppo_epochs):
        order = np.random.default_rng((trainer.config.seed, step, epoch)).permutation(episodes)
        yield from (part.tolist() for part in np.array_split(order, trainer.ppo.minibatches))


def backpropagate(
    trainer: PpoTrainer,
    experience: Experience,
    rows: Sequence[int],
    tokens: int,
    losses: LossSums,
) -> Tensor:
    """Backpropagate this rank's part of a minibatch; return its part of the loss.

    `rows` are those of the minibatch among the episodes of all ranks, `tokens` those of the whole
    minibatch; its sums are added to `losses`.
    """
    device, config = trainer.actor_critic.device, trainer.config
    own = range(experience.first, experience.first + len(experience.sequences))
    sums = torch.zeros_like(losses.sums)
    total = torch.zeros((), device=device)
    own_rows = [row - experience.first for row in rows if row in own]
    for batch in trainer.passes(experience.sequences, own_rows, experience.mask):
        loss, pass_sums = _backpropagate_pass(trainer, experience, batch, tokens)
        sums += pass_sums
        total += loss
    all_sums = trainer.all_reduce(sums)
    losses.sums += all_sums
    losses.tokens += tokens
    losses.updates += 1
    if config.stop_kl:
        losses.last_kl = float(all_sums[SUMS.index("policy_kl")]) / tokens
    return total


def _backpropagate_pass(
    trainer: PpoTrainer, experience: Experience, batch: Pass, tokens: int
) -> tuple[Tensor, Tensor]:
    """Backpropagate both losses of a pass, one after the other: half the activations at a time.

    L = L_CLIP + c1 L_VF - c2 S, each a mean over tokens, S the entropy, L_VF with its factor of 1/2
    (Schulman et al., 2017, arXiv:1707.06347, eq. 9, negated).

    Returns:
        The pass's part of L, and its sums in the order of SUMS.
    """
    config, rows, mask = trainer.config, batch.rows, batch.mask
    log_probs, logits = trainer.actor_critic.log_probs(batch)
    old, advantages = experience.log_probs[rows], experience.advantages[rows]
    policy = policy_loss(batch.unflatten(log_probs), old, advantages, mask, config.clip)
    loss = policy.loss / tokens
    if config.entropy_coef:
        loss = loss - config.entropy_coef * entropy_from_logits(logits).sum() / tokens
    loss.backward()  # type: ignore[no-untyped-call]
    del logits, log_probs
    values, old = batch.unflatten(trainer.actor_critic.values(batch)), experience.values[rows]
    clip = config.value_clip or math.inf
    value = value_loss(values, old, experience.returns[rows], mask, clip)
    weighted = config.value_coef * value.loss / tokens
    weighted.backward()  # type: ignore[no-untyped-call]
    parts = (policy.loss, value.loss, policy.clipped, value.clipped, policy.kl)
    sums = torch.stack([part.detach().double() for part in parts])
    return (loss + weighted).detach(), sums


def _step(trainer: PpoTrainer, loss: Tensor, flag: StopFlag) -> StepOutcome:
    """Sum the gradients of all ranks, clip them, and update where all is finite."""
    state = trainer.state
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    weights = [weight for group in groups for weight in group["params"]]
    if state.world > 1:
        _all_reduce_gradients(trainer, weights)
        loss = trainer.all_reduce(loss[None])[0]
    return update(
        state,
        trainer.optimizers,
        weights,
        loss,
        0,
        flag,
        lambda: f"episodes of step {state.progress.step + 1:,}",
    )


def _all_reduce_gradients(trainer: PpoTrainer, weights: Sequence[Tensor]) -> None:
    """Sum the gradients over ranks in one transfer; a rank may have no part in a minibatch."""
    grads = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
    summed = trainer.all_reduce(torch.cat([grad.flatten() for grad in grads]))
    parts = torch.split(summed, [weight.numel() for weight in weights])
    for weight, part in zip(weights, parts, strict=True):
        weight.grad = part.view_as(weight)


class PolicyLoss(NamedTuple):
    """Sums over the mask."""

    loss: Tensor
    clipped: Tensor
    """Tokens at which the clipped term is the larger one; without gradients."""
    kl: Tensor
    """k3 estimate of KL(old || new), in nats; without gradients."""


class ValueLoss(NamedTuple):
    """Sums over the mask."""

    loss: Tensor
    clipped: Tensor
    """Values at which the clipped error is the larger one."""


def policy_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, clip: float
) -> PolicyLoss:
    """Negated clipped surrogate objective (Schulman et al., 2017, arXiv:1707.06347, eq. 7).

    L = -sum min(r A, clip(r, 1 - epsilon, 1 + epsilon) A), with r = p_new / p_old of a token. The
    estimate of KL(old || new) is r - 1 - log r (Schulman, 2020, Approximating KL Divergence).

    Args:
        log_probs: log p_new (B, R), under the policy that learns.
        old_log_probs: log p_old (B, R), under the policy that sampled.
        advantages: A (B, R).
        mask: (B, R) tokens that count.
        clip: epsilon.
    """
    log_ratio = (log_probs - old_log_probs).where(mask, 0.0)
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip)
    with torch.no_grad():
        count = ((clipped > unclipped) & mask).sum()
        kl = (ratio - 1 - log_ratio).where(mask, 0.0).sum()
    return PolicyLoss(torch.maximum(unclipped, clipped).where(mask, 0.0).sum(), count, kl)


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float
) -> ValueLoss:
    """Clipped squared error of the values.

    L = 1/2 sum max((V - R)^2, (clip(V, V_old - epsilon, V_old + epsilon) - R)^2), from the code of
    OpenAI Baselines (ppo2/model.py); Engstrom et al. (2020, arXiv:2005.12729, section 3) describe
    it.

    Args:
        values: V (B, R) that learn.
        old_values: V_old (B, R), at the time of sampling.
        returns: R (B, R), the targets.
        mask: (B, R) tokens that count.
        clip: epsilon of the values; infinity does not clip.
    """
    held = torch.minimum(torch.maximum(values, old_values - clip), old_values + clip)
    unclipped, clipped = (values - returns) ** 2, (held - returns) ** 2
    count = ((clipped > unclipped) & mask).sum()
    return ValueLoss(0.5 * torch.maximum(unclipped, clipped).where(mask, 0.0).sum(), count)

"""Update policy and value model: several passes over a step's episodes, in minibatches.

What makes a minibatch is a function of seed, step and pass, over the episodes of all processes; a
loss is a sum over tokens divided by those of the whole minibatch. So it makes no difference in how
many pieces, or on how many processes, a minibatch is computed. The losses take (B, R) tensors.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llmctl.ppo.episodes import Episodes, Pass, passes
from llmctl.ppo.models import entropy_of
from llmctl.ppo.trainer import PpoTrainer
from llmctl.signals import StopFlag
from llmctl.training.fault_tolerance import Verdict
from llmctl.training.loop import update as update_weights

SUMS = ("policy_loss", "value_loss", "clipped", "value_clipped", "policy_kl")


@dataclass
class Tally:
    """Sums over the tokens of updates, kept on the device so that none is waited for."""

    sums: Tensor
    """In the order of SUMS."""
    tokens: int = 0
    updates: int = 0
    last_kl: float = 0.0
    """Of the last minibatch, in nats a token."""


def update(trainer: PpoTrainer, episodes: Episodes, flag: StopFlag) -> Verdict:
    """Train policy and value model on a step's episodes; the verdict on all of it. Collective.

    Raises:
        DivergedError: a loss or a gradient is not finite, and the run is to stop at that.
    """
    begun = time.perf_counter()
    lengths = trainer.gathered([len(r) for r in episodes.sequences.responses])
    tally = Tally(torch.zeros(len(SUMS), dtype=torch.float64, device=trainer.actors.device))
    verdict: Verdict | None = None
    for rows in minibatches(trainer, len(lengths)):
        tokens = int(lengths[torch.as_tensor(rows)].sum())
        loss = accumulate(trainer, episodes, rows, tokens, tally)
        verdict = _step(trainer, loss, flag)
        if trainer.config.stop_kl and tally.last_kl > trainer.config.stop_kl:
            break
    assert verdict is not None
    found = shares(tally)
    trainer.latest |= found
    trainer.latest["update_seconds"] = round(time.perf_counter() - begun, 4)
    mean = found["policy_loss"] + trainer.config.value_coef * found["value_loss"]
    return replace(
        verdict, loss=verdict.loss.new_tensor(mean), tokens=trainer.latest["response_tokens"]
    )


def minibatches(trainer: PpoTrainer, count: int) -> Iterator[Sequence[int]]:
    """Numbers, among the episodes of all processes, of each minibatch in order."""
    step = trainer.state.progress.step
    for epoch in range(trainer.ppo.ppo_epochs):
        order = np.random.default_rng((trainer.config.seed, step, epoch)).permutation(count)
        yield from (part.tolist() for part in np.array_split(order, trainer.ppo.minibatches))


def accumulate(
    trainer: PpoTrainer, episodes: Episodes, rows: Sequence[int], tokens: int, tally: Tally
) -> Tensor:
    """Backpropagate this rank's part of a minibatch; return its part of the loss.

    Args:
        trainer: the models.
        episodes: of this rank.
        rows: of the minibatch, among the episodes of all ranks.
        tokens: of the whole minibatch.
        tally: is added to.
    """
    actors, config = trainer.actors, trainer.config
    mine = [r - episodes.first for r in rows if 0 <= r - episodes.first < len(episodes.sequences)]
    sums = torch.zeros_like(tally.sums)
    total = torch.zeros((), device=actors.device)
    for batch in passes(
        episodes.sequences,
        mine,
        most_tokens=trainer.ppo.pass_tokens,
        most_chosen=trainer.most_chosen,
        mask=episodes.mask,
        device=actors.device,
    ):
        found = _losses(trainer, episodes, batch, tokens)
        sums += found[1]
        total += found[0]
    counted = trainer.total(sums)
    tally.sums += counted
    tally.tokens += tokens
    tally.updates += 1
    if config.stop_kl:
        tally.last_kl = float(counted[SUMS.index("policy_kl")]) / tokens
    return total


def _losses(
    trainer: PpoTrainer, episodes: Episodes, batch: Pass, tokens: int
) -> tuple[Tensor, Tensor]:
    """Backpropagate both losses of a pass, one after the other: half the activations at a time.

    Returns:
        Their weighted sum, and what is counted, in the order of SUMS.
    """
    config, rows, mask = trainer.config, batch.rows, batch.mask
    log_probs, logits = trainer.actors.log_probs(batch)
    old, advantages = episodes.log_probs[rows], episodes.advantages[rows]
    policy = policy_loss(batch.spread(log_probs), old, advantages, mask, config.clip)
    loss = policy.loss / tokens
    if config.entropy_coef:
        loss = loss - config.entropy_coef * entropy_of(logits).sum() / tokens
    loss.backward()  # type: ignore[no-untyped-call]
    del logits, log_probs
    values, old = batch.spread(trainer.actors.values(batch)), episodes.values[rows]
    clip = config.value_clip or math.inf
    value = value_loss(values, old, episodes.returns[rows], mask, clip)
    weighted = config.value_coef * value.loss / tokens
    weighted.backward()  # type: ignore[no-untyped-call]
    parts = (policy.loss, value.loss, policy.clipped, value.clipped, policy.kl)
    sums = torch.stack([part.detach().double() for part in parts])
    return (loss + weighted).detach(), sums


def _step(trainer: PpoTrainer, loss: Tensor, flag: StopFlag) -> Verdict:
    """Add the gradients of all ranks up, clip them, and update where all is finite."""
    state = trainer.state
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    weights = [weight for group in groups for weight in group["params"]]
    if state.world > 1:
        _add_up(trainer, weights)
        loss = trainer.total(loss[None])[0]
    return update_weights(
        state,
        trainer.optimizers,
        weights,
        loss,
        0,
        flag,
        max_grad_norm=trainer.config.max_grad_norm,
        name=lambda: f"episodes of step {state.progress.step + 1:,}",
    )


def _add_up(trainer: PpoTrainer, weights: Sequence[Tensor]) -> None:
    """Sum the gradients over ranks in one transfer; a rank may have no part in a minibatch."""
    grads = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
    summed = trainer.total(torch.cat([grad.flatten() for grad in grads]))
    for weight, part in zip(
        weights, torch.split(summed, [w.numel() for w in weights]), strict=True
    ):
        weight.grad = part.view_as(weight)


def shares(tally: Tally) -> dict[str, float]:
    """Means over the tokens of all updates."""
    means = (tally.sums / tally.tokens).tolist()
    found = dict(zip(SUMS, means, strict=True))
    found["clip_fraction"] = found.pop("clipped")
    found["value_clip_fraction"] = found.pop("value_clipped")
    return {**found, "updates": tally.updates}


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

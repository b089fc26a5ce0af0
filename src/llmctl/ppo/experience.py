"""A step's episodes: sample, score, and work out what each token was worth."""

import math
import time
from typing import Any

import torch
from torch import Tensor

from llmctl.hardware import threads_set
from llmctl.ppo.advantages import (
    kl_penalty,
    masked_mean,
    response_advantages,
    token_rewards,
    whiten,
)
from llmctl.ppo.episodes import Episodes, passes
from llmctl.ppo.rewards import Raw, Scored
from llmctl.ppo.rollout import Halted, Rollout
from llmctl.ppo.rules import Told
from llmctl.ppo.trainer import Asked, PpoTrainer
from llmctl.signals import StopFlag
from llmctl.training.fault_tolerance import together

FORWARD_ONLY = 4
"""How many times as many tokens a pass without gradients may hold."""


def collect(trainer: PpoTrainer, flag: StopFlag) -> Episodes | None:
    """The episodes of the step at hand; None where a signal came on any rank. Collective.

    Raises:
        DataError: a reward that fails, or gives what is no number.
    """
    begun = time.perf_counter()
    step, state = trainer.state.progress.step, trainer.state
    values = trainer.hyperparameters
    first = (step * state.world + state.rank) * values.batch_size
    prompts = [n for n in trainer.order.batch(step) for _ in range(trainer.config.num_samples)]
    numbers = list(range(first, first + values.batch_size))
    found: tuple[Rollout, Raw] | None = None
    with together(state.accelerator):
        try:
            rollout = sample(trainer, trainer.asked, prompts, numbers, flag)
            raw = trainer.rewards.raw(tell(trainer.asked, prompts, rollout), rollout.ended)
            found = rollout, raw
        except Halted:
            pass
    if stopped(trainer, flag) or found is None:
        return None
    rollout, raw = found
    if trainer.rewards.normalization == "running":
        trainer.rewards.measure(raw, trainer.total)
    episodes = weigh(trainer, rollout, trainer.rewards.combine(raw, rollout.ended))
    trainer.latest["rollout_seconds"] = round(time.perf_counter() - begun, 4)
    return episodes


def stopped(trainer: PpoTrainer, flag: StopFlag) -> int:
    """The signal that any rank received, 0 without one. Collective."""
    if trainer.state.world == 1:
        return flag.received
    return int(trainer.gathered([flag.received]).max())


def sample(
    trainer: PpoTrainer,
    asked: Asked,
    prompts: list[int],
    numbers: list[int],
    flag: StopFlag,
    *,
    of_reference: bool = False,
) -> Rollout:
    """Responses of the policy, or of the reference, to these prompts.

    Raises:
        Halted: a signal came.
    """
    actors = trainer.actors
    model = actors.reference if of_reference else actors.policy
    tokens = [asked.tokens[n] for n in prompts]
    with threads_set(trainer.sampling_threads(len(tokens))), torch.no_grad():
        return trainer.sampler.sample(model, tokens, numbers, flag, actors.autocast)


def tell(asked: Asked, prompts: list[int], rollout: Rollout) -> list[Told]:
    """What rewards are told of each response."""
    return [asked.told(n, text) for n, text in zip(prompts, rollout.texts, strict=True)]


@torch.no_grad()
def weigh(trainer: PpoTrainer, rollout: Rollout, scored: Scored) -> Episodes:
    """Values, rewards, advantages and returns of every token; and the step's first metrics."""
    actors, config = trainer.actors, trainer.config
    mask = rollout.sequences.mask()
    sampled = rollout.log_probs(mask.shape[1])
    reference, values, computed = (torch.zeros(mask.shape) for _ in range(3))
    for batch in all_passes(trainer, rollout, mask, FORWARD_ONLY):
        rows = batch.rows.cpu()
        reference[rows] = batch.spread(actors.reference_log_probs(batch)).float().cpu()
        values[rows] = batch.spread(actors.values(batch)).float().cpu()
        if not trainer.exact:
            computed[rows] = batch.spread(actors.log_probs(batch)[0]).float().cpu()
    log_probs = sampled if trainer.exact else computed
    kl = kl_penalty(log_probs, reference, config.kl_estimator)
    rewards = token_rewards(scored.total, kl, mask, trainer.kl_coef)
    advantages, returns = response_advantages(rewards, values, mask, config.gamma, config.lam)
    if config.whiten_advantages:
        advantages = whiten(advantages, mask, trainer.total)
    trainer.latest = metrics_of(trainer, rollout, scored, mask, log_probs - reference, log_probs)
    trainer.latest["explained_variance"] = explained_variance(trainer, values, returns, mask)
    device = actors.device
    return Episodes(
        rollout.sequences,
        trainer.state.rank * trainer.hyperparameters.batch_size,
        mask,
        *(part.to(device) for part in (log_probs, values, advantages, returns, sampled)),
    )


def all_passes(trainer: PpoTrainer, rollout: Rollout, mask: Tensor, factor: int) -> Any:
    """Every row of a rollout, in passes of so many times the usual tokens."""
    return passes(
        rollout.sequences,
        range(len(rollout.sequences)),
        most_tokens=factor * trainer.ppo.pass_tokens,
        most_chosen=factor * trainer.most_chosen,
        mask=mask,
        device=trainer.actors.device,
    )


def metrics_of(
    trainer: PpoTrainer,
    rollout: Rollout,
    scored: Scored,
    mask: Tensor,
    log_ratio: Tensor,
    log_probs: Tensor,
) -> dict[str, Any]:
    """Means over the episodes of all processes.

    The KL is the sum of log p - log q over a response; the entropy is estimated by -log p of the
    sampled tokens, whose mean it is.
    """
    tokens = mask.sum()
    sums = [scored.total.sum(), *(raw.sum() for raw in scored.raw.values())]
    sums += [
        (scored.total**2).sum(),
        log_ratio.where(mask, 0.0).sum(),
        -log_probs.where(mask, 0.0).sum(),
        torch.tensor(sum(rollout.ended)),
        tokens,
        torch.tensor(len(rollout.sequences)),
    ]
    found = trainer.total(torch.stack([part.double().cpu() for part in sums])).tolist()
    *means, squares, kl, surprise, ended, tokens_all, count = found
    named = dict(zip(["score", *(f"score/{n}" for n in scored.raw)], means, strict=True))
    mean = named["score"] / count
    return {
        **{name: value / count for name, value in named.items()},
        "score_std": math.sqrt(max(0.0, squares / count - mean**2)),
        "kl": kl / count,
        "entropy": surprise / tokens_all,
        "eos_share": ended / count,
        "length": tokens_all / count,
        "response_tokens": round(tokens_all),
        "step_episodes": round(count),
    }


def explained_variance(trainer: PpoTrainer, values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over all tokens; 1 is a perfect value model."""

    def variance(found: Tensor) -> float:
        mean = masked_mean(found, mask, trainer.total)
        return float(masked_mean((found - mean) ** 2, mask, trainer.total))

    whole = variance(returns)
    return 1 - variance(returns - values) / whole if whole > 0 else 0.0

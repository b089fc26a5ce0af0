"""Collect a step's experience: sample, score, compute advantages.

In: a `PpoTrainer`. Out: an `Experience`, and the step's first metrics in `trainer.metrics`.
"""

import math
import time
from contextlib import suppress
from typing import Any, NamedTuple

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
from llmctl.ppo.encoded_prompts import EncodedPrompts
from llmctl.ppo.episodes import Experience
from llmctl.ppo.rewards import RawScores
from llmctl.ppo.rollout import Rollout, RolloutInterrupted
from llmctl.ppo.trainer import PpoTrainer
from llmctl.signals import StopFlag
from llmctl.training.fault_tolerance import together

FORWARD_ONLY = 4
"""A pass without gradients may hold this many times as many tokens."""


def collect_experience(trainer: PpoTrainer, flag: StopFlag) -> Experience | None:
    """Collect the current step's experience; None where a signal came on any rank. Collective.

    Raises:
        DataError: a reward that fails, or gives NaN or infinity.
    """
    started = time.perf_counter()
    step, state = trainer.state.progress.step, trainer.state
    batch_size = trainer.state.values.batch_size
    first = (step * state.world + state.rank) * batch_size
    prompts = [i for i in trainer.order.batch(step) for _ in range(trainer.config.num_samples)]
    stream_ids = list(range(first, first + batch_size))
    scored: ScoredRollout | None = None
    with together(state.accelerator), suppress(RolloutInterrupted):
        scored = sample_responses(trainer, trainer.prompts, prompts, stream_ids, flag)
    if received_signal(trainer, flag) or scored is None:
        return None
    rollout, raw = scored
    if trainer.rewards.normalization == "running":
        trainer.rewards.measure(raw, trainer.all_reduce)
    scores = trainer.rewards.combine(raw, rollout.ended)
    experience = compute_advantages(trainer, rollout, raw, scores)
    trainer.metrics["rollout_seconds"] = round(time.perf_counter() - started, 4)
    return experience


def received_signal(trainer: PpoTrainer, flag: StopFlag) -> int:
    """The signal that any rank received, 0 without one. Collective."""
    if trainer.state.world == 1:
        return flag.received
    return int(trainer.all_gather([flag.received]).max())


class ScoredRollout(NamedTuple):
    """Responses and what each reward gives them."""

    rollout: Rollout
    raw: RawScores


def sample_responses(
    trainer: PpoTrainer,
    prompts: EncodedPrompts,
    indices: list[int],
    stream_ids: list[int],
    flag: StopFlag,
    *,
    from_reference: bool = False,
) -> ScoredRollout:
    """Have policy or reference respond to the prompts of these indices; score the responses.

    Raises:
        RolloutInterrupted: a signal came.
        DataError: a reward that fails.
    """
    models = trainer.actor_critic
    model = models.reference if from_reference else models.policy
    tokens = [prompts.tokens[i] for i in indices]
    with threads_set(trainer.sampling_threads(len(tokens))), torch.no_grad():
        rollout = trainer.sampler.sample(model, tokens, stream_ids, flag, models.autocast)
    samples = prompts.samples(indices, rollout.texts)
    return ScoredRollout(rollout, trainer.rewards.raw(samples, rollout.ended))


@torch.no_grad()
def compute_advantages(
    trainer: PpoTrainer, rollout: Rollout, raw: RawScores, scores: Tensor
) -> Experience:
    """Compute values, rewards, advantages and returns of every token, and the step's metrics."""
    models, config = trainer.actor_critic, trainer.config
    mask = rollout.sequences.mask()
    sampler_log_probs = rollout.log_probs(mask.shape[1])
    reference, values, computed = (torch.zeros(mask.shape) for _ in range(3))
    rows_of_all = range(len(rollout.sequences))
    for batch in trainer.passes(rollout.sequences, rows_of_all, mask, FORWARD_ONLY):
        rows = batch.rows.cpu()
        reference[rows] = batch.unflatten(models.reference_log_probs(batch)).float().cpu()
        values[rows] = batch.unflatten(models.values(batch)).float().cpu()
        if not trainer.reuses_log_probs:
            computed[rows] = batch.unflatten(models.log_probs(batch)[0]).float().cpu()
    log_probs = sampler_log_probs if trainer.reuses_log_probs else computed
    kl = kl_penalty(log_probs, reference, config.kl_estimator)
    rewards = token_rewards(scores, kl, mask, trainer.kl_coef)
    advantages, returns = response_advantages(rewards, values, mask, config.gamma, config.lam)
    if config.whiten_advantages:
        advantages = whiten(advantages, mask, trainer.all_reduce)
    log_ratio = log_probs - reference
    trainer.metrics = rollout_metrics(trainer, rollout, raw, scores, mask, log_ratio, log_probs)
    trainer.metrics["explained_variance"] = explained_variance(trainer, values, returns, mask)
    tensors = (log_probs, values, advantages, returns, sampler_log_probs)
    return Experience(
        rollout.sequences,
        trainer.state.rank * trainer.state.values.batch_size,
        mask,
        *(tensor.to(models.device) for tensor in tensors),
    )


def rollout_metrics(
    trainer: PpoTrainer,
    rollout: Rollout,
    raw: RawScores,
    scores: Tensor,
    mask: Tensor,
    log_ratio: Tensor,
    log_probs: Tensor,
) -> dict[str, Any]:
    """Means over the episodes of all processes.

    The KL is the sum of log p - log q over a response; the entropy is estimated by -log p of the
    sampled tokens, whose mean it is.
    """
    tokens = mask.sum()
    sums = [scores.sum(), *(part.sum() for part in raw.values())]
    sums += [
        (scores**2).sum(),
        log_ratio.where(mask, 0.0).sum(),
        -log_probs.where(mask, 0.0).sum(),
        torch.tensor(sum(rollout.ended)),
        tokens,
        torch.tensor(len(rollout.sequences)),
    ]
    totals = trainer.all_reduce(torch.stack([part.double().cpu() for part in sums])).tolist()
    *score_sums, squares, kl, surprise, ended, all_tokens, count = totals
    names = ["score", *(f"score/{name}" for name in raw)]
    means = {name: total / count for name, total in zip(names, score_sums, strict=True)}
    return {
        **means,
        "score_std": math.sqrt(max(0.0, squares / count - means["score"] ** 2)),
        "kl": kl / count,
        "entropy": surprise / all_tokens,
        "eos_share": ended / count,
        "length": all_tokens / count,
        "response_tokens": round(all_tokens),
        "step_episodes": round(count),
    }


def explained_variance(trainer: PpoTrainer, values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over all tokens; 1 is a perfect value model."""

    def variance(tensor: Tensor) -> float:
        mean = masked_mean(tensor, mask, trainer.all_reduce)
        return float(masked_mean((tensor - mean) ** 2, mask, trainer.all_reduce))

    total = variance(returns)
    return 1 - variance(returns - values) / total if total > 0 else 0.0

"""Several rewards as one: functions from samples to scores in, a weighted sum out.

Each reward model's scores are normalized first, r <- (r - mean) / std, so that weights mean the
same for all: with mean and std of the reference's responses as in Ziegler et al. (2019,
arXiv:1909.08593, section 2). Llama 2 whitens its combined rewards, too (Touvron et al., 2023,
arXiv:2307.09288, section 3.2.3).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from llmctl.data.sources import split_weight
from llmctl.errors import UserError
from llmctl.ppo.advantages import AllReduce
from llmctl.ppo.rules import Rule, Sample, require_finite

MIN_STD = 1e-6
"""Scores that do not vary are divided by this: by less, rounding would become noise."""
RawScores = dict[str, Tensor]
"""Scores (N,) of each reward, by its name, before normalization."""
Scorer = Callable[[Sequence[Sample], Sequence[bool]], Tensor]
"""Scores (N,) of samples, given which of the responses ended by themselves."""


@dataclass
class RunningMoments:
    """Mean and standard deviation of scores, batch by batch."""

    mean: float = 0.0
    std: float = 1.0
    count: float = 0.0
    squares: float = 0.0
    """Sum of squared distances from the mean."""

    def update(self, scores: Tensor, all_reduce: AllReduce) -> None:
        """Add scores (N,) of all processes.

        S <- S + S_batch + d^2 n n_batch / (n + n_batch), with d the difference of the means (Chan,
        Golub and LeVeque, 1979, Updating Formulae and a Pairwise Algorithm for Computing Sample
        Variances).
        """
        scores = scores.double()
        n, sum_ = all_reduce(torch.tensor([len(scores), float(scores.sum())], dtype=torch.float64))
        mean = float(sum_ / n)
        squares = float(all_reduce(((scores - mean) ** 2).sum()[None])[0])
        count, shift = self.count + float(n), mean - self.mean
        self.squares += squares + shift**2 * self.count * float(n) / count
        self.mean += shift * float(n) / count
        self.count = count
        self.std = math.sqrt(self.squares / max(1.0, self.count - 1))

    @property
    def divisor(self) -> float:
        """Standard deviation, or the least that scores are divided by."""
        return max(self.std, MIN_STD)

    def normalize(self, scores: Tensor, clip: float) -> Tensor:
        """Scores (N,) of mean 0 and variance 1, clipped to +- `clip` unless that is 0."""
        normalized = (scores - self.mean) / self.divisor
        return normalized.clamp(-clip, clip) if clip else normalized


@dataclass
class RewardSource:
    """One reward of the weighted sum."""

    name: str
    """In metrics: the last part of a path, or the rule."""
    weight: float
    score: Scorer
    is_model: bool
    moments: RunningMoments = field(default_factory=RunningMoments)


@dataclass(frozen=True)
class RewardSum:
    """All rewards of a run."""

    sources: list[RewardSource]
    normalization: str
    """reference, running or none; rules are never normalized."""
    clip: float
    missing_eos_penalty: float

    def raw(self, samples: Sequence[Sample], ended: Sequence[bool]) -> RawScores:
        """Score samples by each reward; raise a DataError where one fails, or is not finite."""
        raw = {}
        for source in self.sources:
            scores = source.score(samples, ended).float()
            require_finite(source.name, scores.tolist(), samples)
            raw[source.name] = scores
        return raw

    @property
    def is_unmeasured(self) -> bool:
        """Whether moments are needed that no score was added to."""
        models = [source for source in self.sources if source.is_model]
        return self.normalization != "none" and any(not model.moments.count for model in models)

    def measure(self, raw: RawScores, all_reduce: AllReduce) -> None:
        """Add scores to the moments of each reward model."""
        for source in self.sources:
            if source.is_model and self.normalization != "none":
                source.moments.update(raw[source.name], all_reduce)

    def combine(self, raw: RawScores, ended: Sequence[bool]) -> Tensor:
        """Normalize, weight and add the scores; penalize responses that did not end.

        The sums (N,) are what PPO maximizes.
        The penalty is subtracted, as by TRL; the EOS trick it stands for replaces the score
        (Huang et al., 2024, arXiv:2403.17031, section 7).
        """
        total = torch.zeros(len(ended))
        for source in self.sources:
            scores = raw[source.name]
            if source.is_model and self.normalization != "none":
                scores = source.moments.normalize(scores, self.clip)
            total = total + source.weight * scores
        return total - self.missing_eos_penalty * ~torch.tensor(list(ended), dtype=torch.bool)

    def state(self) -> list[list[float]]:
        """Moments of each reward, for a checkpoint."""
        moments = (source.moments for source in self.sources)
        return [[m.mean, m.std, m.count, m.squares] for m in moments]

    def restore(self, state: list[list[float]]) -> None:
        """Restore the moments that `state` gave."""
        for source, moments in zip(self.sources, state, strict=True):
            source.moments = RunningMoments(*moments)


def rule_reward(name: str, weight: float, rule: Rule) -> RewardSource:
    """Make a reward of a rule."""
    return RewardSource(name, weight, lambda samples, _: torch.tensor(rule(samples)), False)


def parse_weight(flag: str, text: str) -> tuple[str, float]:
    """Split `runs/helpful=0.7` into name and weight, or 1; raise a UserError for 0 or infinity."""
    name, number = split_weight(text)
    weight = float(number.removeprefix("=") or 1)
    if not weight or not math.isfinite(weight):
        raise UserError(f"{flag} {text}: the weight must be a number other than 0")
    return name, weight


def unique_names(references: Sequence[str]) -> list[str]:
    """Short name of each reward for metrics: its folder's, numbered where two are alike."""
    shorts = [text if ":" in text else Path(text).name or text for text in references]
    return [
        short if shorts.count(short) == 1 else f"{short}-{shorts[: i + 1].count(short)}"
        for i, short in enumerate(shorts)
    ]

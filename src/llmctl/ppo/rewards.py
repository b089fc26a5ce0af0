"""Several rewards as one: each a function from texts to scores, normalised by itself and weighted.

Llama 2 (Touvron et al., 2023, arXiv:2307.09288, section 3.2.2) joins helpfulness and safety so; a
weight may also be negative.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from llmctl.errors import UserError
from llmctl.ppo.advantages import Sum
from llmctl.ppo.rules import Rule, Told, require_finite

LEAST_DEVIATION = 1e-6
"""Of scores that do not vary: dividing by less would make noise of rounding."""
Raw = dict[str, Tensor]
"""Scores (N,) of each source, as it gave them."""
Scorer = Callable[[Sequence[Told], Sequence[bool]], Tensor]
"""Scores (N,) of responses, told which of them ended by themselves."""


@dataclass
class Scale:
    """Mean and deviation of a source's scores: how they are brought to mean 0 and variance 1."""

    mean: float = 0.0
    deviation: float = 1.0
    count: float = 0.0
    squares: float = 0.0
    """Sum of squared distances from the mean."""

    def take(self, scores: Tensor, total: Sum) -> None:
        """Count scores (N,) of all processes in (Chan et al., 1979, parallel variance)."""
        scores = scores.double()
        n, sum_ = total(torch.tensor([len(scores), float(scores.sum())], dtype=torch.float64))
        mean = float(sum_ / n)
        squares = float(total(((scores - mean) ** 2).sum()[None])[0])
        both, shift = self.count + float(n), mean - self.mean
        self.squares += squares + shift**2 * self.count * float(n) / both
        self.mean += shift * float(n) / both
        self.count = both
        self.deviation = math.sqrt(self.squares / max(1.0, self.count - 1))

    @property
    def deviation_used(self) -> float:
        """What scores are divided by."""
        return max(self.deviation, LEAST_DEVIATION)

    def apply(self, scores: Tensor, clip: float) -> Tensor:
        """Scores (N,) normalised, and held within `clip` where that is not 0."""
        found = (scores - self.mean) / self.deviation_used
        return found.clamp(-clip, clip) if clip else found


@dataclass
class Source:
    """One reward."""

    name: str
    """As metrics call it: the last part of a path, or the rule."""
    weight: float
    score: Scorer
    is_model: bool
    scale: Scale = field(default_factory=Scale)


@dataclass(frozen=True)
class Scored:
    """What responses were found to be worth."""

    total: Tensor
    """(N,) weighted sum of the normalised scores: what PPO maximises."""
    raw: Raw


@dataclass(frozen=True)
class Rewards:
    """All rewards of a run."""

    sources: list[Source]
    normalization: str
    """reference, running or none; rules are never normalised."""
    clip: float
    missing_eos_penalty: float

    def raw(self, told: Sequence[Told], ended: Sequence[bool]) -> Raw:
        """Scores (N,) of each source.

        Raises:
            DataError: a source that fails, or gives what is no number.
        """
        found = {}
        for source in self.sources:
            scores = source.score(told, ended).float()
            require_finite(source.name, scores.tolist(), told)
            found[source.name] = scores
        return found

    @property
    def is_unmeasured(self) -> bool:
        """Whether a scale is wanted that nothing has been measured for."""
        models = [source for source in self.sources if source.is_model]
        return self.normalization != "none" and any(not model.scale.count for model in models)

    def measure(self, raw: Raw, total: Sum) -> None:
        """Count scores in for the normalisation."""
        for source in self.sources:
            if source.is_model and self.normalization != "none":
                source.scale.take(raw[source.name], total)

    def combine(self, raw: Raw, ended: Sequence[bool]) -> Scored:
        """Normalise, weigh and add; then the penalty for responses that did not end."""
        total = torch.zeros(len(ended))
        for source in self.sources:
            scores = raw[source.name]
            if source.is_model and self.normalization != "none":
                scores = source.scale.apply(scores, self.clip)
            total = total + source.weight * scores
        total -= self.missing_eos_penalty * ~torch.tensor(list(ended), dtype=torch.bool)
        return Scored(total, raw)

    def state(self) -> list[list[float]]:
        """For a checkpoint: the scale of each source."""
        scales = (source.scale for source in self.sources)
        return [[s.mean, s.deviation, s.count, s.squares] for s in scales]

    def restore(self, state: list[list[float]]) -> None:
        """Put back what `state` took."""
        for source, scale in zip(self.sources, state, strict=True):
            source.scale = Scale(*scale)


def rule_source(name: str, weight: float, rule: Rule) -> Source:
    """A rule as a reward."""
    return Source(name, weight, lambda told, _: torch.tensor(rule(told)), is_model=False)


def weighted(flag: str, text: str) -> tuple[str, float]:
    """What a reward is called and what it weighs: `runs/helpful=0.7`, 1 where nothing is said.

    Raises:
        UserError: a weight of 0, or one that is not finite.
    """
    stem, sign, number = text.rpartition("=")
    if not sign or Path(text).expanduser().exists():
        return text, 1.0
    try:
        weight = float(number)
    except ValueError:
        return text, 1.0
    if not weight or not math.isfinite(weight):
        raise UserError(f"{flag} {text}: the weight must be a number other than 0")
    return stem, weight


def named_apart(references: Sequence[str]) -> list[str]:
    """A short name for each, as metrics show it: the folder's, numbered where two are alike."""
    shorts = [text if ":" in text else Path(text).name or text for text in references]
    return [
        short if shorts.count(short) == 1 else f"{short}-{shorts[: i + 1].count(short)}"
        for i, short in enumerate(shorts)
    ]

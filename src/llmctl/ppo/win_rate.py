"""Held-out prompts, answered by the policy and by the reference: who is better, and at what KL."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmctl.ppo.experience import all_passes, sample, tell
from llmctl.ppo.rewards import Raw, Scored
from llmctl.ppo.rollout import Rollout
from llmctl.ppo.trainer import PpoTrainer
from llmctl.runs.ownership import SAMPLES
from llmctl.signals import StopFlag
from llmctl.training.fault_tolerance import together
from llmctl.training.reward_report import wilson

NUMBERS = 1 << 40
"""Where the numbers of held-out episodes begin: no episode of training has their noise."""


@dataclass(frozen=True)
class Answers:
    """Responses to this rank's share of the held-out prompts, and what they are worth."""

    numbers: list[int]
    rollout: Rollout
    raw: Raw


class Judge:
    """Compares the policy with the reference on held-out prompts."""

    def __init__(self, trainer: PpoTrainer) -> None:
        """Nothing is sampled yet."""
        self.trainer = trainer
        self._reference: Answers | None = None

    def begin(self, flag: StopFlag) -> None:
        """Have the reference answer, once for the whole run. Collective.

        Raises:
            Halted: a signal came.
            DataError: a reward that fails.
        """
        if len(self.trainer.held_out):
            self._reference = self._answers(flag, of_reference=True)

    def evaluate(self) -> dict[str, float]:
        """Scores, win rate and KL over all held-out prompts. Collective.

        `val_loss` is minus what PPO maximises: the score less the penalty on the KL.
        """
        trainer, reference = self.trainer, self._reference
        assert reference is not None
        with together(trainer.state.accelerator):
            found = self._answers(StopFlag())
        kl = self._kl(found.rollout)
        scored, before = self._scored(found), self._scored(reference)  # on today's scale, both
        ours, theirs = scored.total, before.total
        wins = (ours > theirs).double() + 0.5 * (ours == theirs).double()
        parts = [
            *(ours, *scored.raw.values(), theirs, theirs**2, kl, wins),
            torch.tensor([len(r) for r in found.rollout.sequences.responses]),
            torch.tensor(found.rollout.ended),
        ]
        sums = torch.stack([part.double().sum() for part in (*parts, torch.ones(len(wins)))])
        *means, count = trainer.total(sums).tolist()
        names = ["val_score", *(f"val_score/{name}" for name in scored.raw)]
        names += ["reference", "squares", "val_kl", "val_win_rate", "val_length", "val_eos_share"]
        facts = dict(zip(names, (mean / count for mean in means), strict=True))
        mean, squares = facts.pop("reference"), facts.pop("squares")
        low, high = wilson(facts["val_win_rate"] * count, count)
        self._show(found, ours, theirs)
        return {
            "val_loss": trainer.config.kl_coef * facts["val_kl"] - facts["val_score"],
            **facts,
            "val_win_rate_low": low,
            "val_win_rate_high": high,
            "val_reference_score": mean,
            "val_reference_std": math.sqrt(max(0.0, squares - mean**2)),
            "val_prompts": count,
        }

    def _answers(self, flag: StopFlag, *, of_reference: bool = False) -> Answers:
        trainer = self.trainer
        asked, state = trainer.held_out, trainer.state
        mine = list(range(len(asked)))[state.rank :: state.world]
        noise = [NUMBERS + number for number in mine]
        rollout = sample(trainer, asked, mine, noise, flag, of_reference=of_reference)
        raw = trainer.rewards.raw(tell(asked, mine, rollout), rollout.ended)
        return Answers(mine, rollout, raw)

    def _scored(self, answers: Answers) -> Scored:
        return self.trainer.rewards.combine(answers.raw, answers.rollout.ended)

    @torch.no_grad()
    def _kl(self, rollout: Rollout) -> Tensor:
        """(B,) log p - log q of each response."""
        actors, mask = self.trainer.actors, rollout.sequences.mask()
        found = torch.zeros(len(mask), dtype=torch.float64)
        for batch in all_passes(self.trainer, rollout, mask, 1):
            ratio = actors.log_probs(batch)[0] - actors.reference_log_probs(batch)
            found[batch.rows.cpu()] = batch.spread(ratio).double().sum(1).cpu()
        return found

    def _show(self, found: Answers, ours: Tensor, theirs: Tensor) -> None:
        """Write the first few prompts with what was and is answered."""
        trainer, reference = self.trainer, self._reference
        assert reference is not None
        for place, number in enumerate(found.numbers[: trainer.config.samples]):
            row: dict[str, Any] = {
                "step": trainer.state.progress.step,
                "prompt": trainer.held_out.rows[number].text,
                "before": reference.rollout.texts[place],
                "now": found.rollout.texts[place],
                "score_before": float(theirs[place]),
                "score": float(ours[place]),
            }
            trainer.state.run.log(row, SAMPLES)

"""Win rate on held-out prompts: the policy's responses against the reference's, and at what KL.

In: a `PpoTrainer`. Out: the metrics of an evaluation, and rows of samples.jsonl.
"""

import math
from typing import Any

import torch
from torch import Tensor

from llmctl.ppo.experience import ScoredRollout, sample_responses
from llmctl.ppo.rollout import Rollout
from llmctl.ppo.trainer import PpoTrainer
from llmctl.runs.ownership import SAMPLES
from llmctl.signals import StopFlag
from llmctl.training.evaluation_share import spread
from llmctl.training.fault_tolerance import together
from llmctl.training.reward_report import wilson

HELD_OUT_STREAMS = 1 << 40
"""First stream id of held-out episodes: no episode of training has theirs."""


class WinRate:
    """Compares the policy with the reference on held-out prompts."""

    def __init__(self, trainer: PpoTrainer) -> None:
        """Begin without responses of the reference."""
        self.trainer = trainer
        self._reference: ScoredRollout | None = None
        state = trainer.state
        total = len(trainer.held_out)
        read = spread(total, state.values.eval_rows or total)
        self._indices = read[state.rank :: state.world]
        """Numbers of this rank's share of the prompts."""

    def sample_reference(self, flag: StopFlag) -> None:
        """Sample and score the reference's responses, once for the whole run. Collective.

        Raises:
            RolloutInterrupted: a signal came.
            DataError: a reward that fails.
        """
        if len(self.trainer.held_out):
            self._reference = self._sample(flag, from_reference=True)

    def evaluate(self) -> dict[str, float]:
        """Compute scores, win rate and KL over all held-out prompts. Collective.

        A tie is half a win; the interval is Wilson's of 95 %. `val_loss` is minus what PPO
        maximizes: the score less the penalty on the KL. Both models' scores are normalized with
        today's moments.
        """
        trainer, reference = self.trainer, self._reference
        assert reference is not None
        with together(trainer.state.accelerator):
            policy = self._sample(StopFlag())
        kl = self._kl(policy.rollout)
        ours, theirs = (
            trainer.rewards.combine(scored.raw, scored.rollout.ended)
            for scored in (policy, reference)
        )
        wins = (ours > theirs).double() + 0.5 * (ours == theirs).double()
        parts = [
            *(ours, *policy.raw.values(), theirs, theirs**2, kl, wins),
            torch.tensor([len(r) for r in policy.rollout.sequences.responses]),
            torch.tensor(policy.rollout.ended),
        ]
        sums = torch.stack([part.double().sum() for part in (*parts, torch.ones(len(wins)))])
        *totals, count = trainer.all_reduce(sums).tolist()
        names = ["val_score", *(f"val_score/{name}" for name in policy.raw)]
        names += ["reference", "squares", "val_kl", "val_win_rate", "val_length", "val_eos_share"]
        metrics = dict(zip(names, (total / count for total in totals), strict=True))
        mean, squares = metrics.pop("reference"), metrics.pop("squares")
        low, high = wilson(metrics["val_win_rate"] * count, count)
        self._log_samples(policy, ours, theirs)
        return {
            "val_loss": trainer.config.kl_coef * metrics["val_kl"] - metrics["val_score"],
            **metrics,
            "val_win_rate_low": low,
            "val_win_rate_high": high,
            "val_reference_score": mean,
            "val_reference_std": math.sqrt(max(0.0, squares - mean**2)),
            "val_prompts": count,
        }

    def _sample(self, flag: StopFlag, *, from_reference: bool = False) -> ScoredRollout:
        stream_ids = [HELD_OUT_STREAMS + index for index in self._indices]
        return sample_responses(
            self.trainer,
            self.trainer.held_out,
            self._indices,
            stream_ids,
            flag,
            from_reference=from_reference,
        )

    @torch.no_grad()
    def _kl(self, rollout: Rollout) -> Tensor:
        """KL (B,) of each response: the sum of log p - log q."""
        models, mask = self.trainer.actor_critic, rollout.sequences.mask()
        kl = torch.zeros(len(mask), dtype=torch.float64)
        for batch in self.trainer.passes(rollout.sequences, range(len(mask)), mask):
            log_ratio = models.log_probs(batch)[0] - models.reference_log_probs(batch)
            kl[batch.rows.cpu()] = batch.unflatten(log_ratio).double().sum(1).cpu()
        return kl

    def _log_samples(self, policy: ScoredRollout, ours: Tensor, theirs: Tensor) -> None:
        """Write the first few prompts with both models' responses."""
        trainer, reference = self.trainer, self._reference
        assert reference is not None
        for place, index in enumerate(self._indices[: trainer.config.samples]):
            row: dict[str, Any] = {
                "step": trainer.state.progress.step,
                "prompt": trainer.held_out.rows[index].text,
                "before": reference.rollout.texts[place],
                "now": policy.rollout.texts[place],
                "score_before": float(theirs[place]),
                "score": float(ours[place]),
            }
            trainer.state.run.log(row, SAMPLES)

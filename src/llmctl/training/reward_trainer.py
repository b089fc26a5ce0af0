"""Reward modelling on TRL's RewardTrainer, with our batches, loss, validation and guarantees.

The loss is the mean over the weights of all pairs of a step, however they are cut into
micro-batches and ranks; RewardTrainer's is a mean of means, and knows no weights.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer

from llmctl.training.pairwise import PairBatches, pair_scores, preference_loss
from llmctl.training.state import generators_kept
from llmctl.training.trl import Terms
from llmctl.training.tuned import Tuned
from llmctl.training.tuning import TuningPlan


class PairTrainer(Tuned, RewardTrainer):
    """RewardTrainer on pairs that are encoded already."""

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        train: PairBatches,
        val: PairBatches | None,
        plan: TuningPlan,
        arguments: RewardConfig,
        terms: Terms,
    ) -> None:
        """Build the trainer on a model that is adapted already, if it is to be.

        Raises:
            UserError: what cannot be resumed exactly.
        """
        self.plan, self._val = plan, val
        super().__init__(
            model=model,
            args=arguments,
            data_collator=train.collate,
            train_dataset=train.as_dataset(),
            eval_dataset=None if val is None else val.as_dataset(),
            processing_class=tokenizer,
            terms=terms,
        )

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """The pairs as they are: they are encoded."""
        return dataset

    def _get_num_items_in_batch(
        self, batch_samples: Sequence[dict[str, Tensor]], device: torch.device
    ) -> Tensor:
        """Weights of a step's pairs, summed over its micro-batches and ranks. Collective."""
        total = torch.stack([batch["weight"].sum() for batch in batch_samples]).sum().to(device)
        summed: Tensor = self.accelerator.gather(total[None]).sum()
        return summed

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """The loss of a micro-batch as its share of the step's mean over pairs."""
        chosen, rejected = pair_scores(model, inputs)
        right = (chosen.detach() > rejected.detach()).sum()
        self.count(right, right.new_tensor(len(chosen)))
        center = self.args.center_rewards_coefficient or 0.0
        loss = preference_loss(chosen, rejected, inputs["margin"], inputs["weight"], center)
        return self.share(loss, num_items_in_batch)

    @torch.no_grad()
    def _measure(self) -> dict[str, float]:
        """Mean loss, accuracy and difference over every validation pair of all ranks.

        The loss is that of the preferences alone, without margins and centering.
        """
        assert self._val is not None
        model, was_training = self.model, self.model.training
        model.eval()
        sums = torch.zeros(4, dtype=torch.float64, device=self.args.device)
        with generators_kept():
            size = self.args.train_batch_size
            for numbers in self._val.shares(size, self.job.rank, self.job.world):
                batch = {k: v.to(self.args.device) for k, v in self._val.batch(numbers).items()}
                with self.compute_loss_context_manager():
                    chosen, rejected = pair_scores(model, batch)
                weight, apart = batch["weight"], chosen - rejected
                loss = preference_loss(chosen, rejected, weight=weight)
                right = (weight * (apart > 0)).sum()
                sums += torch.stack([loss, right, (weight * apart).sum(), weight.sum()]).double()
            loss, right, apart, total = self.accelerator.reduce(sums, "sum").tolist()
        model.train(was_training)
        return {
            "val_loss": loss / total,
            "val_accuracy": right / total,
            "val_margin": apart / total,
        }

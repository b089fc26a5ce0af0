"""Supervised fine-tuning on TRL's SFTTrainer, with our batches, loss, validation and guarantees.

SFTTrainer sets the model up and Trainer runs the steps. Batches come encoded (`sequences.py`), the
loss is that of the tokens that count (`head.py`), and validation is a mean over tokens, where
Trainer's is a mean over batches.
"""

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from llmctl.config.stages import SftConfig as Config
from llmctl.training.head import counted_loss, output_layer, require_chunkable
from llmctl.training.placement import autocast
from llmctl.training.sequences import Rows, numbered, on_device, shares
from llmctl.training.state import generators_kept
from llmctl.training.trl import Terms
from llmctl.training.tuned import Tuned, common_arguments
from llmctl.training.tuning import TuningPlan


@dataclass(frozen=True)
class Material:
    """What a trainer is made of."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    train: Rows
    val: Rows | None


class SupervisedTrainer(Tuned, SFTTrainer):
    """SFTTrainer on rows that are encoded already."""

    measured = ("token_accuracy",)

    def __init__(
        self,
        material: Material,
        plan: TuningPlan,
        arguments: SFTConfig,
        terms: Terms,
        *,
        chunked: bool,
    ) -> None:
        """Build the trainer on a model that is adapted already, if it is to be.

        Raises:
            UserError: what cannot be resumed exactly, or a loss that cannot be chunked.
            ModelError: the model has no output layer.
        """
        self.plan, self._material, self._chunked = plan, material, chunked
        self._head = output_layer(material.model)
        super().__init__(
            model=material.model,
            args=arguments,
            data_collator=material.train.collate,
            train_dataset=numbered(material.train.lengths),
            eval_dataset=None if material.val is None else numbered(material.val.lengths),
            processing_class=material.tokenizer,
            terms=terms,
        )
        # compute_loss divides by the tokens of the step
        self.model_accepts_loss_kwargs: bool = True
        for weight in self.model.parameters():
            if weight.requires_grad and isinstance(self.model, PeftModel):
                weight.data = weight.data.float()  # SFTTrainer's bf16 would lose small updates
        if chunked:
            batch = on_device(material.train.batch([0]), self.args.device)
            with autocast(plan, self.args.device.type):
                require_chunkable(self.model, self._head, batch)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """The loss of a micro-batch as its share of the step's mean over tokens."""
        found = counted_loss(model, self._head, inputs, chunked=self._chunked)
        self.count(found.correct, found.tokens)
        return self.balanced(self.share(found.loss, num_items_in_batch), found.balance)

    @torch.no_grad()
    def _measure(self) -> dict[str, float]:
        """Mean loss and accuracy over every trained token of the validation data."""
        assert self._material.val is not None
        model = self.model
        was_training = model.training
        model.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=self.args.device)
        with generators_kept():
            lengths, size = self._material.val.lengths, self.args.train_batch_size
            for numbers in shares(lengths, size, self.job.rank, self.job.world):
                batch = on_device(self._material.val.batch(numbers), self.args.device)
                with self.compute_loss_context_manager():
                    found = counted_loss(model, self._head, batch, chunked=self._chunked)
                sums += torch.stack([found.loss, found.correct, found.tokens]).double()
            loss, correct, tokens = self.accelerator.reduce(sums, "sum").tolist()
        model.train(was_training)
        return {"val_loss": loss / tokens, "val_token_accuracy": correct / tokens}


def make_arguments(config: Config, plan: TuningPlan, device: str) -> SFTConfig:
    """What SFTTrainer is told."""
    return SFTConfig(
        **common_arguments(config, plan, device),
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
    )

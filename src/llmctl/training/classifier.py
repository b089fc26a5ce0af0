"""Sequence classification on Trainer, with our batches, loss, validation and guarantees.

The loss is the mean over the texts of a whole step, however they are cut into micro-batches, and
validation is a mean over texts, where Trainer's is a mean over batches.
"""

from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments

from llmctl.data.labelled import Texts
from llmctl.training.sequences import numbered, shares
from llmctl.training.state import generators_kept
from llmctl.training.trl import Terms
from llmctl.training.tuned import Tuned
from llmctl.training.tuning import TuningPlan


class Batches:
    """Texts as (B, L) tensors, padded at the right."""

    def __init__(self, texts: Texts, pad: int) -> None:
        """Take the texts; `pad` fills the rest of a row."""
        self.texts, self.pad = texts, pad

    def __len__(self) -> int:
        """Number of texts, N."""
        return len(self.texts)

    def as_dataset(self) -> datasets.Dataset:
        """What Trainer takes for data: the numbers of the texts, which `collate` looks up."""
        return numbered(self.texts.lengths.tolist())

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """The batch of the texts that have these numbers: what Trainer's collator does."""
        return self.batch([example["row"] for example in examples])

    def batch(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask` (B, L), `labels` (B,) and `tokens` (a count)."""
        rows = [self.texts.text(number) for number in numbers]
        shape = (len(rows), max(len(row) for row in rows))
        ids = np.full(shape, self.pad, dtype=np.int64)
        mask = np.zeros(shape, dtype=np.int64)
        for place, row in enumerate(rows):
            ids[place, : len(row)] = row
            mask[place, : len(row)] = 1
        return {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(mask),
            "labels": torch.from_numpy(self.texts.classes[list(numbers)]),
            "tokens": torch.tensor(int(mask.sum())),
        }

    def shares(self, size: int, rank: int = 0, world: int = 1) -> list[list[int]]:
        """A rank's texts in batches of like length, each text on one rank."""
        return shares(self.texts.lengths.tolist(), size, rank, world)


class Classifier(Tuned, Trainer):  # type: ignore[misc]
    """Trainer on texts that are encoded already."""

    def __init__(
        self,
        model: Any,
        train: Batches,
        val: Batches | None,
        plan: TuningPlan,
        arguments: TrainingArguments,
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
            terms=terms,
        )
        # compute_loss divides by the texts of the step
        self.model_accepts_loss_kwargs: bool = True

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """The loss of a micro-batch as its share of the step's mean over texts."""
        logits, labels = classify(model, inputs), inputs["labels"]
        right = (logits.detach().argmax(-1) == labels).sum()
        self.count(right, right.new_tensor(len(labels)))
        return self.share(cross_entropy(logits, labels, reduction="sum"), num_items_in_batch)

    @torch.no_grad()
    def _measure(self) -> dict[str, float]:
        """Mean loss, accuracy and macro F1 over every validation text of all ranks."""
        assert self._val is not None
        model, was_training = self.model, self.model.training
        model.eval()
        classes = int(model.config.num_labels)
        loss = torch.zeros(1, dtype=torch.float64, device=self.args.device)
        counts = torch.zeros(3, classes, dtype=torch.float64, device=self.args.device)
        with generators_kept():
            size = self.args.train_batch_size
            for numbers in self._val.shares(size, self.job.rank, self.job.world):
                batch = {k: v.to(self.args.device) for k, v in self._val.batch(numbers).items()}
                with self.compute_loss_context_manager():
                    logits = classify(model, batch)
                loss += cross_entropy(logits, batch["labels"], reduction="sum")
                counts += class_counts(batch["labels"], logits.argmax(-1), classes)
            loss, counts = (self.accelerator.reduce(part, "sum") for part in (loss, counts))
        model.train(was_training)
        texts, right = float(counts[1].sum()), float(counts[0].sum())
        return {
            "val_loss": float(loss) / texts,
            "val_accuracy": right / texts,
            "val_macro_f1": macro_f1(counts),
        }


def class_counts(labels: Tensor, guesses: Tensor, classes: int) -> Tensor:
    """(3, K) of each class: texts told rightly, texts that have it, texts that were told to.

    Args:
        labels: (N,) true classes.
        guesses: (N,) classes that the model tells.
        classes: K.
    """
    parts = (labels[labels == guesses], labels, guesses)
    return torch.stack([torch.bincount(part, minlength=classes) for part in parts])


def macro_f1(counts: Tensor) -> float:
    """Mean over classes of 2 TP / (2 TP + FP + FN), from `class_counts`.

    Classes that no text has and none was told to have no F1, and do not count; one that was only
    ever missed has an F1 of 0. That is scikit-learn's `f1_score(average="macro", zero_division=0)`.
    """
    right, true, told = counts.double()
    there = true + told > 0
    return float((2 * right[there] / (true + told)[there]).mean())


def classify(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Logits (B, K) of a batch, in float32."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits: Tensor = model(**inputs).logits
    return logits.float()

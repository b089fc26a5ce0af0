"""Sequence classification: labelled texts and any model in, a trainer out."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import cross_entropy

from llmctl.config.commands.sft import SftConfig
from llmctl.data.classification import ClassificationData, EncodedTexts
from llmctl.runs.directory import Run
from llmctl.training.base_model import Prepared, load_with_head, prepare
from llmctl.training.batches import Batch
from llmctl.training.loop import Trainer
from llmctl.training.objective import Loss, Validation


class TextRows:
    """N texts as (B, L) tensors, padded at the right; each weighs 1."""

    def __init__(self, texts: EncodedTexts, pad: int) -> None:
        """Take the texts; `pad` fills the rest of a row."""
        self.texts, self.pad = texts, pad
        self.lengths: list[int] = texts.lengths.tolist()
        self.weights = np.ones(len(texts))

    def __len__(self) -> int:
        """N."""
        return len(self.texts)

    def batch(self, numbers: Sequence[int]) -> Batch:
        """`input_ids` and `attention_mask` (B, L), `labels` (B,), `weight` and `tokens`."""
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
            "weight": len(rows),
            "tokens": int(mask.sum()),
        }


class Classification:
    """Cross-entropy of the labels of texts, a mean over texts."""

    figures = ("accuracy",)

    def __init__(self, classes: int, val: Validation | None) -> None:
        """Take the number of labels and the validation data."""
        self.classes, self.val = classes, val

    def loss(self, model: Any, batch: Batch) -> Loss:
        """Sum over the texts of a batch."""
        logits, labels = class_logits(model, batch), batch["labels"]
        correct = (logits.detach().argmax(-1) == labels).sum()
        sums = torch.stack([correct, correct.new_tensor(len(labels))])
        return Loss(cross_entropy(logits, labels, reduction="sum"), batch["weight"], sums)

    def validate(self, model: Any) -> dict[str, float]:
        """Mean loss, accuracy and macro F1 over every validation text."""
        assert self.val is not None
        totals = self.val.sums(model, self._measure)
        loss, counts = float(totals[0]), totals[1:].view(3, self.classes)
        texts = float(counts[1].sum())
        return {
            "val_loss": loss / texts,
            "val_accuracy": float(counts[0].sum()) / texts,
            "val_macro_f1": macro_f1(counts),
        }

    def _measure(self, model: Any, batch: Batch) -> Tensor:
        """(1 + 3 K,) summed loss of a batch, and `class_counts`."""
        logits, labels = class_logits(model, batch), batch["labels"]
        loss = cross_entropy(logits, labels, reduction="sum")
        counts = class_counts(labels, logits.argmax(-1), self.classes)
        return torch.cat([loss[None].double(), counts.flatten().double()])


def prepare_classification(
    config: SftConfig, data: ClassificationData, accelerator: Accelerator, device: str
) -> Prepared:
    """Load the model with a head for the labels, adapt it, arrange the texts.

    Raises:
        ModelError: a model that does not load, cannot classify, or whose answer padding changes.
        UserError: settings that do not go together.
        ResourceError: an optimizer or a precision that does not run here.
    """
    order = data.train.lengths.argsort()
    shortest, longest = (data.train.text(int(number)).tolist() for number in order[[0, -1]])
    most = max(int(texts.lengths.max()) for texts in (data.train, data.val or data.train))
    model = load_with_head(
        config, data.labels, data.tokenizer, (shortest, longest), device, longest=most
    )
    pad = int(data.tokenizer.pad_token_id)
    train = TextRows(data.train, pad)
    val = None if data.val is None else TextRows(data.val, pad)
    loss = Classification(len(data.labels), None).loss
    return prepare(
        config, "texts", model, train, val, accelerator, device, loss=loss, is_classifier=True
    )


def build_classification(
    config: SftConfig,
    data: ClassificationData,
    prepared: Prepared,
    run: Run,
    accelerator: Accelerator,
    device: str,
) -> Trainer:
    """Put the trainer together."""
    objective = Classification(len(data.labels), prepared.validation(accelerator, device))
    return prepared.assemble(config, data, run, accelerator, device, objective, settings={})


def class_logits(model: Any, batch: Batch) -> Tensor:
    """Logits (B, K) of a batch, in float32."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits: Tensor = model(**inputs).logits
    return logits.float()


def class_counts(labels: Tensor, guesses: Tensor, classes: int) -> Tensor:
    """(3, K) of each class: texts told rightly, texts that have it, texts that were told to.

    `labels` are the true classes, `guesses` those that the model tells, (N,) each.
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

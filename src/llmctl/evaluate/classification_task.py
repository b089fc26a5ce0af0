"""Classify labelled texts: each text's most likely label, with its probability, comes out."""

from collections.abc import Callable
from typing import Any

import torch

from llmctl.config.commands.evaluate import EvaluateConfig
from llmctl.data.tokenized import resolve_max_length
from llmctl.errors import ModelError
from llmctl.evaluate.prepare import EvaluatedModel, EvaluationPlan
from llmctl.evaluate.task import EvaluationTask, Row
from llmctl.models.classifiers import (
    load_tuned_classifier,
    logits_of,
    pad_right,
    probe_padding,
)
from llmctl.models.loading import local_folder
from llmctl.runs.directory import resolve_model


def classification_task(
    config: EvaluateConfig, plan: EvaluationPlan, evaluated: EvaluatedModel, load: Callable[[], Any]
) -> EvaluationTask:
    """The task of labelling every text, cut where it is longer than the model reads."""
    tokenizer, labels = evaluated.tokenizer, evaluated.labels
    assert labels is not None
    options: dict[str, Any] = {
        "split_special_tokens": True,
        "truncation": True,
        "max_length": resolve_max_length(None, evaluated.shape, tokenizer=tokenizer),
    }

    @torch.inference_mode()
    def compute(units: range) -> list[Row]:
        examples, model = [plan.prompts[number].example for number in units], load()
        tokens = [tokenizer(example.text, **options)["input_ids"] for example in examples]
        batch = pad_right(tokens, int(tokenizer.pad_token_id))
        rows = []
        for example, probabilities in zip(
            examples, logits_of(model, batch).softmax(-1).cpu(), strict=True
        ):
            label = labels[int(probabilities.argmax())]
            rows.append(
                {
                    **example.as_row(),
                    "label": label,
                    "probability": float(probabilities.max()),
                    "reference_label": example.reference,
                    "right": float(label == example.reference),
                }
            )
        return rows

    return EvaluationTask(len(plan.prompts), config.batch_size, compute)


def load_evaluated_classifier(evaluated: EvaluatedModel, dtype: torch.dtype, device: str) -> Any:
    """The classifier of a run (full or adapter), a folder or a Hub id, in eval mode.

    Raises:
        ModelError: it is broken, has no padding token, or padding changes its answers.
    """
    assert evaluated.labels is not None
    folder = local_folder(resolve_model(evaluated.reference))
    model = load_tuned_classifier(folder, evaluated.labels, dtype)
    pad = evaluated.tokenizer.pad_token_id
    if pad is None:
        raise ModelError("no padding token: texts cannot be classified in batches", file=folder)
    model.config.get_text_config().pad_token_id = int(pad)
    model = model.to(device).eval()
    probe_padding(model, int(pad))
    return model

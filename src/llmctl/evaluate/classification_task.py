"""Labels that a classifier gives to texts."""

from collections.abc import Callable
from typing import Any

import torch

from llmctl.config.commands import EvaluateConfig
from llmctl.data.classification import length_limit
from llmctl.errors import ModelError
from llmctl.evaluate.task import Row
from llmctl.evaluate.plan import EvaluationPlan, EvaluatedModel
from llmctl.evaluate.task import EvaluationTask
from llmctl.models.adapters import is_adapter, put_adapter, read_adapter, require_base
from llmctl.models.classifiers import (
    load_classifier,
    logits_of,
    pad_right,
    require_padding_unseen,
)
from llmctl.models.loading import find_base, local_folder
from llmctl.runs.directory import resolve_model

PROBE_LENGTHS = (3, 8)
"""Tokens of the texts on which padding is seen to change nothing."""


def classification_task(
    config: EvaluateConfig, plan: EvaluationPlan, subject: EvaluatedModel, load: Callable[[], Any]
) -> EvaluationTask:
    """The work of labelling every text, cut where it is longer than the model reads."""
    tokenizer, labels = subject.tokenizer, subject.labels
    assert labels is not None
    how: dict[str, Any] = {
        "split_special_tokens": True,
        "truncation": True,
        "max_length": length_limit(None, subject.shape, tokenizer),
    }

    @torch.inference_mode()
    def compute(units: range) -> list[Row]:
        some, model = [plan.asked[number].question for number in units], load()
        tokens = [tokenizer(question.text, **how)["input_ids"] for question in some]
        batch = pad_right(tokens, int(tokenizer.pad_token_id))
        shares = logits_of(model, batch).softmax(-1).cpu()
        rows = []
        for question, share in zip(some, shares, strict=True):
            label = labels[int(share.argmax())]
            rows.append(
                {
                    "place": question.place,
                    "line": question.line,
                    "prompt": question.text,
                    "reference": question.reference,
                    "label": label,
                    "probability": float(share.max()),
                    "reference_label": question.reference,
                    "right": float(label == question.reference),
                }
            )
        return rows

    return EvaluationTask(len(plan.asked), config.batch_size, compute)


def load_evaluated_classifier(subject: EvaluatedModel, dtype: torch.dtype, device: str) -> Any:
    """The classifier of a run (full or adapter), a folder or a Hub id, in eval mode.

    Raises:
        ModelError: it is broken, has no padding token, or padding changes what it says.
    """
    assert subject.labels is not None
    folder = local_folder(resolve_model(subject.reference))
    model: Any
    if is_adapter(folder):
        adapter = read_adapter(folder)
        below = find_base(adapter)
        require_base(adapter, below)
        model = put_adapter(
            load_classifier(str(below), subject.labels, dtype).model, adapter, "SEQ_CLS"
        )
    else:
        model = load_classifier(str(folder), subject.labels, dtype).model
    pad = subject.tokenizer.pad_token_id
    if pad is None:
        raise ModelError("no padding token: texts cannot be classified in batches", file=folder)
    model.config.get_text_config().pad_token_id = int(pad)
    model = model.to(device).eval()
    rows = int(model.get_input_embeddings().weight.shape[0])
    tokens = [k for k in range(min(rows, 2 * max(PROBE_LENGTHS) + 2)) if k != pad]
    short, long = (tokens[-length:] for length in PROBE_LENGTHS)
    require_padding_unseen(model, short, long, int(pad))
    return model

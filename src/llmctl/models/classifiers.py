"""Load models with a head that classifies or scores, and check them.

In: a model and its labels. Out: a classifier whose head may be new, all else as it was trained.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

import llmctl.models.patched_attention  # noqa: F401 (of every model that is loaded)
from llmctl.console import said_if_slow
from llmctl.errors import ModelError, UserError
from llmctl.models.adapters import is_adapter, put_adapter, read_adapter, require_base
from llmctl.models.loading import find_base, load_config, local_folder
from llmctl.models.quantized import require_full
from llmctl.models.vetting import (
    BROKEN,
    check_loaded,
    check_shards,
    check_size,
    first_line,
    require_safetensors,
)
from llmctl.runs.directory import resolve_model

SCORE = ("LABEL_0",)
"""Label of a reward model, whose one logit is the score; transformers calls it so."""
TOLERANCE = 1e-3
"""Largest change of a logit, relative to the largest one, that counts as rounding."""
PROBE_LENGTHS = (3, 8)
"""Tokens of the texts on which padding is seen to change nothing."""
POOLER = "pooler"
"""Layer between an encoder and its head; many are saved without it."""


@dataclass(frozen=True)
class LoadedClassifier:
    """A classifier on the CPU, in float32."""

    model: PreTrainedModel
    new_modules: frozenset[str]
    """Layers that the folder lacks, whose weights are random."""


def load_classifier(
    reference: str,
    labels: tuple[str, ...],
    dtype: torch.dtype = torch.float32,
) -> LoadedClassifier:
    """Load a model with a head for these labels: its own if it is a classifier, else a new one.

    A new head is random: seed before.

    Raises:
        ModelError: pickles only, remote code, an adapter, an architecture that cannot classify,
            quantized weights, or tensors that are missing, misshapen or not finite.
        NetworkError: a Hub id that cannot be had.
    """
    folder = local_folder(resolve_model(reference))
    if is_adapter(folder):
        raise ModelError(
            "this model is an adapter, and a second one on it could not be loaded again",
            file=folder,
            hint=f"merge it first: llmctl merge --model {reference} -o runs/merged",
        )
    config = load_config(str(folder))
    require_full(config, folder, "get a head")
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise ModelError(
            f"transformers has no classifier of the architecture {config.model_type}", file=folder
        )
    own = classifier_labels(config)
    if own is not None and labels == SCORE and len(own) != 1:
        raise ModelError(
            f"this model tells {len(own)} labels apart ({', '.join(own[:4])}), a reward model has "
            "one score",
            file=folder,
            hint="start from the model that it was made of",
        )
    _set_labels(config, labels)
    require_safetensors(folder)
    check_shards(folder, config)
    try:
        saved = _tensor_names(folder)
        check_size(folder, config, AutoModelForSequenceClassification, _is_head)
        with said_if_slow(f"loading {folder}"):
            model, report = AutoModelForSequenceClassification.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                trust_remote_code=False,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # refused below, by name
                output_loading_info=True,
            )
    except BROKEN as error:
        raise ModelError(f"the model does not load: {first_line(error)}", file=folder) from None
    allowed = _allowed_problems(model, report, saved, has_head=own is not None)
    check_loaded(model, report, folder, allowed)
    start, missing = f"{model.base_model_prefix}.", allowed.get("missing_keys", ())
    new_modules = frozenset(name.removeprefix(start).split(".")[0] for name in missing)
    return LoadedClassifier(model, new_modules)


def pad_right(rows: Sequence[Sequence[int]], pad: int) -> dict[str, Tensor]:
    """Pad rows of token ids to `input_ids` and `attention_mask` (B, L)."""
    length = max(map(len, rows))
    ids = [[*row, *[pad] * (length - len(row))] for row in rows]
    mask = [[1] * len(row) + [0] * (length - len(row)) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def logits_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Compute logits (B, K) of a batch of inputs, in float32."""
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
    logits: Tensor = model(**inputs).logits
    return logits.float()


def load_tuned_classifier(
    folder: Path, labels: tuple[str, ...], dtype: torch.dtype, base: Any | None = None
) -> Any:
    """Load a trained classifier: of a folder, or of an adapter on its base.

    The `base` below an adapter, where it is loaded already, is not checked again.

    Raises:
        ModelError: it is broken, or the base is not the one that the adapter was trained on.
        NetworkError: a base on the Hub that cannot be had.
    """
    if not is_adapter(folder):
        return load_classifier(str(folder), labels, dtype).model
    adapter = read_adapter(folder)
    if base is None:
        base_folder = find_base(adapter)
        require_base(adapter, base_folder)
        base = load_classifier(str(base_folder), labels, dtype).model
    return put_adapter(base, adapter, "SEQ_CLS")


@torch.no_grad()
def require_padding_unseen(model: Any, short: Sequence[int], long: Sequence[int], pad: int) -> None:
    """Raise a ModelError where the answer to a text depends on how long its neighbours are.

    The model is on its device, and is left in eval mode. Both texts are given as tokens.
    """
    model.eval()
    alone, beside = (logits_of(model, pad_right(rows, pad))[0] for rows in ([short], [short, long]))
    change = float((alone - beside).abs().max() / alone.abs().max().clamp_min(1e-6))
    if not change <= TOLERANCE:
        raise ModelError(
            f"padding changes the answer of this model by {change:.1%}",
            hint="this architecture cannot classify texts in batches",
        )


def probe_padding(model: Any, pad: int) -> None:
    """Call `require_padding_unseen` with texts of any tokens."""
    rows = int(model.get_input_embeddings().weight.shape[0])
    tokens = [token for token in range(min(rows, 2 * max(PROBE_LENGTHS) + 2)) if token != pad]
    short, long = (tokens[-length:] for length in PROBE_LENGTHS)
    require_padding_unseen(model, short, long, pad)


def learned_positions(model: Any) -> int | None:
    """Count learned positions, which RoBERTa and its kin number from after padding.

    None where positions are computed.
    """
    for name, layer in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(layer, torch.nn.Embedding):
            first = 0 if layer.padding_idx is None else layer.padding_idx + 1
            return int(layer.num_embeddings) - first
    return None


def require_positions(model: Any, longest: int) -> None:
    """Raise a UserError for texts that are too long for a model."""
    positions = learned_positions(model)
    if positions is not None and longest > positions:
        raise UserError(
            f"a text of {longest:,} tokens: the model has {positions:,} positions",
            hint=f"pass --max-length {positions}",
        )


def _set_labels(config: PreTrainedConfig, labels: tuple[str, ...]) -> None:
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: number for number, label in enumerate(labels)}
    config.problem_type = "regression" if labels == SCORE else "single_label_classification"
    config.use_cache = False


def _allowed_problems(
    model: Any, report: dict[str, Any], saved: set[str], *, has_head: bool
) -> dict[str, set[str]]:
    """Return the tensors that may be missing or superfluous: those of a head, if there is none."""
    if has_head:
        return {}
    start = f"{model.base_model_prefix}."
    is_whole = any(name.startswith(start) for name in saved)  # else a body without any head
    return {
        "missing_keys": {name for name in report["missing_keys"] if _is_head(model, name)},
        "unexpected_keys": {
            name
            for name in report["unexpected_keys"]
            if POOLER in name.split(".") or (is_whole and not name.startswith(start))
        },
    }


def _is_head(model: Any, name: str) -> bool:
    """Whether a weight is of the head, pooler included."""
    return POOLER in name.split(".") or not name.startswith(f"{model.base_model_prefix}.")


def _tensor_names(folder: Path) -> set[str]:
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            names.update(tensors.keys())
    return names


def classifier_labels(config: PreTrainedConfig) -> tuple[str, ...] | None:
    """Return the labels of a model that is a classifier already, by number; None for others."""
    names = config.architectures or []
    if not any(name.endswith("ForSequenceClassification") for name in names):
        return None
    return tuple(str(config.id2label[number]) for number in sorted(config.id2label))

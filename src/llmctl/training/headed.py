"""Models with a head to classify with: load one, all but the head as it was trained."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from llmctl.adapters import is_adapter
from llmctl.data.labels import own_labels
from llmctl.errors import ModelError
from llmctl.models import DERIVED, load_config, local_folder
from llmctl.rundir import resolve_model
from llmctl.vetting import BROKEN, check_shards, first_line, require_safetensors

POOLER = "pooler"
"""Between an encoder and its head; many are saved without theirs."""


@dataclass(frozen=True)
class Loaded:
    """A classifier on the CPU, in float32."""

    model: PreTrainedModel
    new_modules: frozenset[str]
    """Names of the layers that the folder lacks, whose weights are random."""


def load_classifier(reference: str, labels: tuple[str, ...]) -> Loaded:
    """The model with a head for these labels: its own where it is a classifier, else a new one.

    Random: seed before.

    Raises:
        ModelError: pickles only, remote code, an adapter, an architecture that cannot classify, or
            tensors that are missing, misshapen or not finite.
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
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise ModelError(
            f"transformers has no classifier of the architecture {config.model_type}", file=folder
        )
    has_head = own_labels(config) is not None
    _set_labels(config, labels)
    require_safetensors(folder)
    check_shards(folder, config)
    try:
        saved = _tensor_names(folder)
        _check_size(folder, config)
        model, report = AutoModelForSequenceClassification.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            output_loading_info=True,
        )
    except BROKEN as error:
        raise ModelError(f"the model does not load: {first_line(error)}", file=folder) from None
    return Loaded(model, _check_loaded(model, report, saved, folder, has_head=has_head))


def _set_labels(config: PreTrainedConfig, labels: tuple[str, ...]) -> None:
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: number for number, label in enumerate(labels)}
    config.problem_type = "single_label_classification"
    config.use_cache = False


def _check_size(folder: Path, config: PreTrainedConfig) -> None:
    """Refuse a config.json of a model far larger than its weights, before memory is taken for it.

    Raises:
        ModelError: with both sizes.
    """
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    parameters = sum(weight.numel() for weight in model.parameters())
    new = sum(w.numel() for name, w in model.named_parameters() if _is_head(model, name))
    held = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if parameters - new > held:
        raise ModelError(
            f"config.json describes {parameters:.3g} parameters, the weights have {held:,} bytes",
            file=folder,
        )


def _check_loaded(
    model: Any, report: dict[str, Any], saved: set[str], folder: Path, *, has_head: bool
) -> frozenset[str]:
    """Refuse tensors that transformers made up or left lying; return the layers that are new.

    A head may be new, and that of another task superfluous.

    Raises:
        ModelError: naming the tensor.
    """
    start = f"{model.base_model_prefix}."
    is_whole = any(name.startswith(start) for name in saved)  # else a body without any head
    allowed: dict[str, set[str]] = {}
    if not has_head:
        allowed["missing_keys"] = {n for n in report["missing_keys"] if _is_head(model, n)}
        allowed["unexpected_keys"] = {
            name
            for name in report["unexpected_keys"]
            if POOLER in name.split(".") or (is_whole and not name.startswith(start))
        }
    found = {**report, "mismatched_keys": {name for name, *_ in report["mismatched_keys"]}}
    for problem in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        names = sorted(set(found[problem]) - allowed.get(problem, set()))
        if names := [name for name in names if not name.endswith(DERIVED)]:
            what = problem.removesuffix("_keys")
            raise ModelError(f"{what} weights: {names[0]} (of {len(names)})", file=folder)
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight.sum()):
            raise ModelError(f"weights that are not finite: {name}", file=folder)
    return frozenset(n.removeprefix(start).split(".")[0] for n in allowed.get("missing_keys", ()))


def _is_head(model: Any, name: str) -> bool:
    """Whether a weight is of what a classifier has beyond its body."""
    return POOLER in name.split(".") or not name.startswith(f"{model.base_model_prefix}.")


def _tensor_names(folder: Path) -> set[str]:
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            names.update(tensors.keys())
    return names

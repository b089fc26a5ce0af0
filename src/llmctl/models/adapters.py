"""Save and load adapters: plain PEFT folders, with the base model they belong to.

An adapter needs the very weights that it was trained on, and PEFT only warns of tensors that are
missing or superfluous. So the base is named, its sha256 stands in the header of
adapter_model.safetensors, and what does not fit is refused by name.
"""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from llmctl.errors import ModelError
from llmctl.files import filled_folder, sha256_file
from llmctl.models import hub
from llmctl.models.quantized import LoadIn, loaded_in
from llmctl.models.vetting import (
    BROKEN,
    check_files,
    first_line,
    read_object,
    require_safetensors,
)

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import GenerationConfig, PreTrainedModel

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
BASE_SHA256 = "base_sha256"
BASE_LOADED_IN = "base_loaded_in"
OWN = ".default"
"""Part of the name of every weight that PEFT adds."""
PROMPT = "prompt_embeddings"
"""PEFT's name of virtual tokens."""
SIZES = ("r", "num_virtual_tokens", "num_transformer_submodules", "token_dim")
"""Sizes of tensors in adapter_config.json."""
Kind = Literal["CAUSAL_LM", "SEQ_CLS"]


@dataclass(frozen=True)
class AdapterInfo:
    """Description of an adapter, without its weights."""

    folder: Path
    base: str
    """The model that it was trained on: a folder or a Hub id."""
    base_sha256: str | None
    """Hash of that model's weights; None where the adapter was not made by llmctl."""
    trained_in: LoadIn
    """Precision of that model's weights in training."""
    is_prompt: bool
    """Whether it is prompt tuning: virtual tokens, which no weight of a model can hold."""
    rows: frozenset[int]
    """Rows of the embedding that it has."""


def is_adapted(model: Any) -> TypeGuard[PeftModel]:
    """Whether a model has an adapter; PEFT, which takes long to import, made it then."""
    return "peft" in sys.modules and isinstance(model, sys.modules["peft"].PeftModel)


def is_adapter(folder: Path) -> bool:
    """Whether this folder holds an adapter."""
    return (folder / CONFIG).exists()


def read_adapter(folder: Path) -> AdapterInfo:
    """Read the description of an adapter, without its weights.

    Raises:
        ModelError: no adapter, a pickled or damaged one, or one that names no base.
    """
    if not is_adapter(folder):
        raise ModelError("no adapter here (no adapter_config.json)", file=folder)
    check_files(folder)
    require_safetensors(folder, WEIGHTS)
    raw = read_object(folder / CONFIG)
    base = raw.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ModelError("adapter_config.json names no base model", file=folder)
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            metadata = file.metadata() or {}
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        _check_sizes(raw, shapes, folder)
        rows = _rows(raw.get("trainable_token_indices"), shapes)
    except BROKEN as error:
        raise ModelError(f"the adapter does not load: {first_line(error)}", file=folder) from None
    if raw.get("revision") and hub.is_hub_id(base) and not Path(base).exists():
        base = f"{base}@{raw['revision']}"
    trained_in: Any = metadata.get(BASE_LOADED_IN, "full")
    is_prompt = "num_virtual_tokens" in raw
    return AdapterInfo(folder, base, metadata.get(BASE_SHA256), trained_in, is_prompt, rows)


def save_adapter(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    base: str | Path,
    base_sha256: str,
    generation_config: GenerationConfig | None,
    tensors: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a folder that AutoPeftModelForCausalLM opens, whole or not at all.

    The base is recorded as PEFT can open it, its hash is `weights_sha256`'s. `tensors` are the
    weights to write by their names in the model; None for those that it holds.
    """
    from peft import get_peft_model_state_dict

    config = deepcopy(model.peft_config["default"])
    config.base_model_name_or_path, config.revision = hub.base_reference(str(base))
    config.inference_mode = True
    targets = config.to_dict().get("target_modules")
    if isinstance(targets, list | set):  # a set has another order in every process
        config.target_modules = sorted(targets)
    state = get_peft_model_state_dict(model, tensors, save_embedding_layers=False)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    metadata = {"format": "pt", BASE_SHA256: base_sha256}
    if (precision := loaded_in(model.get_base_model())) != "full":
        metadata[BASE_LOADED_IN] = precision
    with filled_folder(folder) as staging:
        config.save_pretrained(str(staging))
        save_file(state, staging / WEIGHTS, metadata=metadata)
        _sort_metadata(staging / WEIGHTS)
        tokenizer.save_pretrained(staging)
        if generation_config is not None:
            generation_config.save_pretrained(staging)


def _sort_metadata(file: Path) -> None:
    """Sort the header's metadata: safetensors writes it in another order every time.

    The header is a length in 8 bytes, and that many of JSON, perhaps with spaces at its end.
    """
    with file.open("r+b") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size, "the same content, in another order"
        opened.seek(8)
        opened.write(text.ljust(size))


def weights_sha256(folder: Path) -> str:
    """Hash a model's weights: its safetensors files in order of name."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(f"{file.name}\0{sha256_file(file)}\n".encode())
    return digest.hexdigest()


def require_base(adapter: AdapterInfo, base: Path) -> None:
    """Raise a ModelError, naming both, where an adapter was trained on another base than this."""
    if adapter.base_sha256 not in (None, weights_sha256(base)):
        why = "these weights have changed since" if str(base) == adapter.base else f"not on {base}"
        raise ModelError(
            f"the adapter was trained on another base: on {adapter.base}, {why}",
            file=adapter.folder,
            hint="give it the weights it was trained on (their sha256 differs)",
        )


def put_adapter(
    model: PreTrainedModel, adapter: AdapterInfo, kind: Kind = "CAUSAL_LM"
) -> PeftModel:
    """Put an adapter on a model, in eval mode.

    By PEFT's own class: the Auto class of transformers loses DoRA's magnitudes.

    Raises:
        ModelError: tensors that are missing, superfluous, of another shape or not finite; a method
            that PEFT does not know.
    """
    from peft import (
        PeftConfig,
        PeftModelForCausalLM,
        PeftModelForSequenceClassification,
        set_peft_model_state_dict,
    )

    from llmctl.models.patched_lora import fuse_lora  # peft

    folder = adapter.folder
    _grow(model, adapter)
    try:
        config = PeftConfig.from_pretrained(str(folder))
        if config.task_type not in (kind, None):
            what = "for text" if kind == "CAUSAL_LM" else "a reward model"
            raise ModelError(f"an adapter for {config.task_type}, not {what}", file=folder)
        config.inference_mode = True
        tensors = load_file(folder / WEIGHTS, device=str(model.device))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is refused below
            if kind == "SEQ_CLS":
                adapted: PeftModel = PeftModelForSequenceClassification(model, config)
            else:
                adapted = PeftModelForCausalLM(model, config)
            result: Any = set_peft_model_state_dict(adapted, tensors, ignore_mismatched_sizes=True)
    except KeyError as error:  # a layer that was to be saved whole
        raise ModelError(f"missing adapter weights: {error.args[0]}", file=folder) from None
    except (*BROKEN, IndexError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"the adapter does not load: {reason}", file=folder) from None
    weights = dict(adapted.named_parameters())  # without those that are tied to another
    missing = [name for name in result.missing_keys if OWN in name and name in weights]
    superfluous = set(result.unexpected_keys) - ({PROMPT} if adapter.is_prompt else set())
    _check_loaded(weights, tensors, [] if adapter.is_prompt else missing, folder)
    if superfluous:
        raise ModelError(
            f"unexpected adapter weights: {min(superfluous)} (of {len(superfluous)})",
            file=folder,
            hint="the base has no such layer: it is not the one that this adapter was trained on",
        )
    if (folder / "generation_config.json").exists():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(folder)
    return fuse_lora(adapted.eval())


def _grow(model: PreTrainedModel, adapter: AdapterInfo) -> None:
    """Add the rows of the embedding that the adapter has values for."""
    embedding: Any = model.get_input_embeddings()
    count, wanted = embedding.weight.shape[0], max(adapter.rows, default=-1) + 1
    if wanted <= count:
        return
    lacking = next((row for row in range(count, wanted) if row not in adapter.rows), None)
    if lacking is not None:
        raise ModelError(
            f"the adapter has no values for row {lacking} of the embedding, and its base has "
            f"{count} rows",
            file=adapter.folder,
            hint="it was trained on another base",
        )
    model.resize_token_embeddings(wanted, mean_resizing=False)


def _check_loaded(
    weights: dict[str, Any], tensors: dict[str, torch.Tensor], missing: Iterable[str], folder: Path
) -> None:
    """Refuse tensors that are missing or misshapen, of which PEFT only warns, or not finite."""
    for name in missing:
        key = name.replace(OWN, "")
        if key in tensors:
            raise ModelError(
                f"the adapter does not fit this base: {key} is {_shape(tensors[key])}, the base "
                f"takes {_shape(weights[name])}",
                file=folder,
            )
        raise ModelError(f"missing adapter weights: {key}", file=folder)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor.sum()):
            raise ModelError(f"adapter weights that are not finite: {name}", file=folder)


def _check_sizes(raw: dict[str, Any], shapes: dict[str, tuple[int, ...]], folder: Path) -> None:
    """Refuse sizes that no tensor of the adapter has, before memory is taken for them."""
    sizes = {name: raw.get(name) for name in SIZES} | dict(raw.get("rank_pattern") or {})
    largest = max((size for shape in shapes.values() for size in shape), default=0)
    for name, size in sizes.items():
        if isinstance(size, int) and size > largest:
            raise ModelError(
                f"adapter_config.json: {name} of {size:,}, and no tensor has more than {largest:,}",
                file=folder,
            )


def _rows(indices: Any, shapes: dict[str, tuple[int, ...]]) -> frozenset[int]:
    """Return the rows of the embedding that train alone, or all where it was saved whole."""
    lists = indices.values() if isinstance(indices, dict) else [indices or []]
    single = {int(row) for rows in lists for row in rows}
    ends = (
        "embed_tokens.weight",
        "wte.weight",
        "embed_in.weight",
        "embed_tokens.base_layer.weight",
    )
    whole = max((shape[0] for name, shape in shapes.items() if name.endswith(ends)), default=0)
    return frozenset(single) | frozenset(range(whole))


def _shape(tensor: torch.Tensor) -> str:
    return " x ".join(map(str, tensor.shape))

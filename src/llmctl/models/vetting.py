"""Check a model folder before any library reads it: it may come from anyone.

Libraries read a file whole however large, build as many layers as config.json says, and follow an
index to wherever it points. All this is refused here, by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from llmctl.errors import ModelError
from llmctl.files import FETCH_LFS, is_lfs_pointer
from llmctl.models.quantized import first_not_finite

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

BROKEN = (
    OSError,
    ValueError,
    RuntimeError,
    KeyError,
    TypeError,
    ArithmeticError,
    AttributeError,
    SafetensorError,
    StrictDataclassError,
)
"""Errors that libraries raise for damaged files."""
MEGABYTE = 10**6
LARGEST = {
    "config.json": 10 * MEGABYTE,
    "generation_config.json": 10 * MEGABYTE,
    "adapter_config.json": 10 * MEGABYTE,
    "tokenizer_config.json": 10 * MEGABYTE,
    "special_tokens_map.json": 10 * MEGABYTE,
    "added_tokens.json": 10 * MEGABYTE,
    "chat_template.json": 10 * MEGABYTE,
    "chat_template.jinja": 10 * MEGABYTE,
    "model.safetensors.index.json": 100 * MEGABYTE,
    "tokenizer.json": 200 * MEGABYTE,
    "vocab.json": 200 * MEGABYTE,
    "tokenizer.model": 200 * MEGABYTE,
}
"""Largest bytes of each file; those of the largest models are a tenth of it."""
MOST = {r"(layers?|blocks?|stages)$": 1000, r"(experts?|heads?|labels?|groups?)$": 100_000}
"""Largest counts in config.json, by the end of their key; each becomes that many objects."""
DERIVED = (".inv_freq", ".masked_bias", ".attn.bias")
"""Buffers in old checkpoints, which models compute."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def check_files(folder: Path) -> None:
    """Refuse files that are read whole and too large, that are not regular, or not there really.

    Raises:
        ModelError: naming the file; also for a pointer in the place of a file of git-lfs.
    """
    templates = folder.glob("additional_chat_templates/*.jinja")
    limits = {folder / name: limit for name, limit in LARGEST.items()}
    for file, limit in {**limits, **dict.fromkeys(templates, 10 * MEGABYTE)}.items():
        if file.exists() and not file.is_file():
            raise ModelError("not a regular file", file=file)
        if file.exists() and (size := file.stat().st_size) > limit:
            raise ModelError(f"a file of {size:,} bytes; the limit is {limit:,}", file=file)
    for file in sorted(folder.glob("*")):
        is_read = file.name in LARGEST or file.suffix == ".safetensors"
        if is_read and file.is_file() and is_lfs_pointer(file):
            raise ModelError("a pointer of git-lfs, not the file itself", file=file, hint=FETCH_LFS)


def read_object(file: Path) -> dict[str, Any]:
    """Read the object of a JSON file; raise a ModelError for anything else, or too deep."""
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        reason = str(error).splitlines()[0][:200]
        raise ModelError(f"{file.name} does not load: {reason}", file=file.parent) from None
    if not isinstance(content, dict):
        raise ModelError(f"{file.name} does not load: not an object", file=file.parent)
    return content


def check_counts(config: dict[str, Any], folder: Path) -> None:
    """Raise a ModelError for a config.json with more layers, heads or labels than any model has."""
    for key, value in config.items():
        if isinstance(value, dict):
            check_counts(value, folder)
        elif isinstance(value, int):
            most = min((m for name, m in MOST.items() if re.search(name, key)), default=value)
            if value > most:
                shown = f"{value:,}" if value < 10**15 else "more than 10**15"
                raise ModelError(f"config.json: {key} of {shown} is absurd", file=folder)


def require_safetensors(folder: Path, name: str = "*.safetensors") -> None:
    """Raise a ModelError without such weights; pickled ones can run code when they are loaded."""
    if any(folder.glob(name)):
        return
    pickles = [p.name for pattern in PICKLES for p in sorted(folder.glob(pattern))]
    if pickles:
        raise ModelError(
            f"only pickled weights here ({pickles[0]}), which can run code when loaded",
            file=folder,
            hint="ask for safetensors, or convert them where you trust the file",
        )
    raise ModelError(f"no weights ({name}) in this folder", file=folder)


def check_shards(folder: Path, config: PreTrainedConfig) -> None:
    """Raise a ModelError for an index that leads out of its folder, to no file, or to a pickle."""
    explicit = config.to_dict().get("transformers_weights")
    if explicit is None and (folder / "model.safetensors").is_file():
        return
    index = str(explicit or "model.safetensors.index.json")
    if index != Path(index).name:
        raise ModelError(f"config.json points out of its folder, at {index!r}", file=folder)
    if not index.endswith(".index.json") or not (folder / index).is_file():
        return
    if (folder / index).stat().st_size > LARGEST["model.safetensors.index.json"]:
        raise ModelError(f"{index} is too large", file=folder)
    shards = read_object(folder / index).get("weight_map")
    if not isinstance(shards, dict):
        raise ModelError(f"{index} has no weight_map", file=folder)
    for name in {str(shard) for shard in shards.values()}:
        if name != Path(name).name or not name.endswith(".safetensors"):
            raise ModelError(f"{index} points at {name!r}, not at a shard beside it", file=folder)
        if not (folder / name).is_file():
            raise ModelError(f"a shard is missing: {name}", file=folder)


def check_size(
    folder: Path,
    config: PreTrainedConfig,
    auto_class: Any,
    is_new: Callable[[Any, str], bool] = lambda _model, _name: False,
) -> None:
    """Refuse a config.json of a model far larger than its weights, before memory is taken for it.

    A weight takes at least a byte, in quantized formats at least a bit.

    `is_new` says whether the folder may lack a weight, given the model and the weight's name.

    Raises:
        ModelError: with both sizes.
        SafetensorError: weights with a header that does not fit them.
    """
    weights = list(folder.glob("*.safetensors"))
    for file in weights:
        with safe_open(file, "pt"):  # raises for a header that does not fit its file
            pass
    with torch.device("meta"):
        model = auto_class.from_config(config, trust_remote_code=False)
    parameters = sum(p.numel() for n, p in model.named_parameters() if not is_new(model, n))
    size = sum(file.stat().st_size for file in weights)
    if parameters > size * (8 if "quantization_config" in config.to_dict() else 1):
        raise ModelError(
            f"config.json describes {parameters:.3g} parameters, the weights have {size:,} bytes",
            file=folder,
        )


def check_loaded(
    model: Any,
    report: Mapping[str, Any],
    folder: Path,
    allowed: Mapping[str, set[str]] | None = None,
) -> None:
    """Refuse tensors that are missing, misshapen or superfluous, and weights not finite.

    `report` is the loading info of `from_pretrained`, tensors by problem; those `allowed` may have
    it.

    Raises:
        ModelError: naming the tensor.
    """
    for problem in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        tensors = {name if isinstance(name, str) else name[0] for name in report[problem]}
        tensors -= (allowed or {}).get(problem, set())
        if names := sorted(name for name in tensors if not name.endswith(DERIVED)):
            what = problem.removesuffix("_keys")
            raise ModelError(f"{what} weights: {names[0]} (of {len(names)})", file=folder)
    if (name := first_not_finite(model)) is not None:
        raise ModelError(f"weights that are not finite: {name}", file=folder)


def first_line(error: Exception) -> str:
    """Return the first line of a library's error, shortened."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]

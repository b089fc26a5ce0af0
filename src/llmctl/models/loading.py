"""Load and save models and tokenizers: plain Hugging Face folders, nothing else.

transformers' code of models is imported where a model is loaded, since it takes longer than all
else; `llmctl generate` does without it for many models (`decode.plain`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from llmctl.console import log, said_if_slow
from llmctl.errors import ModelError
from llmctl.files import filled_folder
from llmctl.models.adapters import (
    AdapterInfo,
    is_adapter,
    put_adapter,
    read_adapter,
    require_base,
)
from llmctl.models.causality import require_causal_config
from llmctl.models.hub import download, is_hub_id
from llmctl.models.quantized import LoadIn, quantization_config, saved_precision
from llmctl.models.tokenizer_file import (
    PLAIN_CLASSES,
    compare_with_file,
    read_tokenizer,
    switch_off_dropout,
)
from llmctl.models.vetting import (
    BROKEN,
    check_counts,
    check_files,
    check_loaded,
    check_shards,
    check_size,
    first_line,
    read_object,
    require_safetensors,
)
from llmctl.runs.directory import resolve_model, resolve_tokenizer, tokenizer_in_parts

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from llmctl.models.plain import PlainConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
USE_FILE = (
    'to use the file, set "tokenizer_class": "TokenizersBackend" in tokenizer_config.json'
    " (of a copy, where it comes from the Hub)"
)
SAFE_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


def local_folder(reference: str) -> Path:
    """Return the folder of a run, a path or a Hub id, downloaded (safetensors only) if need be.

    A Hub id may name a revision: `owner/name@v1.0`.

    Raises:
        ModelError: no such folder, or a name that no Hub repository can have.
        NetworkError: the Hub cannot be reached, does not know it, or wants a login.
    """
    path = Path(reference).expanduser()
    if path.exists():
        return path
    if not is_hub_id(reference):
        raise ModelError("no such model folder", file=reference)
    return download(reference, SAFE_FILES)


def load_tokenizer(reference: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a tokenize run, a run, a folder or a Hub id.

    Raises:
        ModelError: there is none, it wants to run code of its own, or it gives other tokens than
            its tokenizer.json.
    """
    folder = local_folder(resolve_tokenizer(reference))
    if is_adapter(folder) and not (folder / "tokenizer_config.json").exists():
        folder = find_base(read_adapter(folder))  # made elsewhere: PEFT saves none
    parts = tokenizer_in_parts(folder)
    names = ["tokenizer.json", "tokenizer_config.json"]
    names += ["config.json"] if parts else []  # which says what kind of model they are of
    if not any((folder / name).exists() for name in names):
        raise parts or ModelError("no tokenizer in this folder", file=folder)
    check_files(folder)
    try:
        tokenizer = _open_tokenizer(folder)
    except (*BROKEN, ImportError) as error:
        raise parts or _unloadable(folder, error) from None
    if type(tokenizer) is not PreTrainedTokenizerFast and (folder / "tokenizer.json").exists():
        tokenizer = _as_in_file(tokenizer, folder)
    if tokenizer.is_fast:
        switch_off_dropout(tokenizer.backend_tokenizer, folder)
    return tokenizer


def _open_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Open a tokenizer; what says that it is its tokenizer.json, without looking for a class."""
    settings = _tokenizer_settings(folder)
    is_file = (folder / "tokenizer.json").exists() and "auto_map" not in settings
    if is_file and settings.get("tokenizer_class") == "TokenizersBackend":
        return PreTrainedTokenizerFast.from_pretrained(folder)
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        folder, trust_remote_code=False
    )
    return tokenizer


def _unloadable(folder: Path, error: Exception) -> ModelError:
    """Build the error for a tokenizer that no class opens; its class may not be its file's."""
    declared = _declared_class(folder)
    if declared is None or declared in PLAIN_CLASSES or not (folder / "tokenizer.json").exists():
        return ModelError(f"the tokenizer does not load: {first_line(error)}", file=folder)
    read_tokenizer(folder / "tokenizer.json")  # refuses what is none: then no class is at fault
    return ModelError(
        f"the tokenizer does not load as {declared}, its `tokenizer_class`: {first_line(error)}",
        file=folder,
        hint=USE_FILE,
    )


def _declared_class(folder: Path) -> Any:
    """Return `tokenizer_class` of tokenizer_config.json, None where there is none."""
    return _tokenizer_settings(folder).get("tokenizer_class")


def _tokenizer_settings(folder: Path) -> dict[str, Any]:
    """Return what tokenizer_config.json says, nothing where there is none."""
    file = folder / "tokenizer_config.json"
    return read_object(file) if file.exists() else {}


def _as_in_file(tokenizer: PreTrainedTokenizerBase, folder: Path) -> PreTrainedTokenizerBase:
    """Return a tokenizer that gives the ids of its folder's tokenizer.json.

    Classes of transformers that tokenizer_config.json names, or that go with the model's type, put
    a split and a normalisation of their own around the file's vocabulary. Where only runs of white
    space are cut otherwise (as of SmolLM2, before digits), or where the folder asks for the file,
    the file is used.

    Raises:
        ModelError: the ids are others, and which ones the model knows is not said.
    """
    split = {"add_special_tokens": False, "split_special_tokens": True}
    agreement = compare_with_file(folder, lambda t: list(tokenizer(t, **split)["input_ids"]))
    if agreement == "same":
        return tokenizer
    name = type(tokenizer).__name__
    declared = _declared_class(folder)
    if agreement == "spaced" or declared in PLAIN_CLASSES:
        what = "cuts runs of spaces otherwise" if agreement == "spaced" else "gives other tokens"
        log.info("%s: as %s this tokenizer %s than its file, which is used", folder, name, what)
        return PreTrainedTokenizerFast.from_pretrained(folder)
    raise ModelError(
        f"the tokenizer opens as {name}, which gives other tokens than its tokenizer.json",
        file=folder,
        hint=USE_FILE,
    )


def load_config(reference: str) -> PreTrainedConfig:
    """Load the configuration of a run, a folder or a Hub id.

    Raises:
        ModelError: there is none, it is broken, or it wants to run code of its own.
    """
    folder = local_folder(resolve_model(reference))
    if is_adapter(folder):
        return _base_config(read_adapter(folder))
    if not (folder / "config.json").exists():
        raise ModelError("no config.json in this folder", file=folder)
    check_files(folder)
    raw = read_object(folder / "config.json")
    check_counts(raw, folder)
    from transformers import AutoConfig

    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except BROKEN as error:
        if "trust_remote_code" in str(error) or "auto_map" in raw:
            raise ModelError(
                "this model wants to run Python code of its own, which llmctl never does",
                file=folder,
                hint="use a model of an architecture that transformers carries",
            ) from None
        raise ModelError(f"config.json does not load: {first_line(error)}", file=folder) from None
    return config


def load_causal_lm(
    reference: str, *, dtype: torch.dtype, device: str = "cpu", load_in: LoadIn = "full"
) -> PreTrainedModel:
    """Load the causal language model of a run, full or adapter, a folder or a Hub id, in eval mode.

    Raises:
        ModelError: pickles only, remote code, or tensors that are missing, misshapen or not finite.
        NetworkError: a Hub id that cannot be had.
    """
    from transformers import AutoModelForCausalLM

    import llmctl.models.patched_attention  # noqa: F401 (of every model that is loaded)

    folder = local_folder(resolve_model(reference))
    if is_adapter(folder):
        adapter = read_adapter(folder)
        base = find_base(adapter)
        require_base(adapter, base)
        model = load_causal_lm(str(base), dtype=dtype, device=device, load_in=load_in)
        return put_adapter(model, adapter)
    config = load_config(str(folder))
    require_causal_config(config, folder)
    require_safetensors(folder)
    check_shards(folder, config)
    if saved_precision(config) is not None:
        dtype = config.dtype or dtype  # scales and kept layers go with the type they were made in
    with said_if_slow(f"loading {folder}"):
        try:
            check_size(folder, config, AutoModelForCausalLM)
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                quantization_config=quantization_config(config, load_in, dtype),
                device_map={"": device},
                trust_remote_code=False,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # refused below, by name
                output_loading_info=True,
            )
        except (*BROKEN, ImportError) as error:  # of a method of quantization that is not installed
            raise ModelError(f"the model does not load: {first_line(error)}", file=folder) from None
        check_loaded(model, report, folder)
    return model.eval()


def find_base(adapter: AdapterInfo, reference: str | None = None) -> Path:
    """Find the folder of the model under an adapter: the one that it was trained on.

    `reference` names another base instead.

    Raises:
        ModelError: it is gone, or an adapter itself.
        NetworkError: a Hub id that cannot be had.
    """
    name = resolve_model(reference or adapter.base)
    if Path(name).is_absolute() and not Path(name).exists():
        raise ModelError(
            f"the base of this adapter is gone: {name}",
            file=adapter.folder,
            hint="put it back, or: llmctl merge --model ADAPTER --base WHERE -o OUT",
        )
    folder = local_folder(name)
    if is_adapter(folder):
        raise ModelError("the base of this adapter is an adapter itself", file=adapter.folder)
    return folder


def save_model(
    model: PreTrainedModel,
    state: dict[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
) -> None:
    """Write a folder that `from_pretrained` opens, whole or not at all.

    The model gives the configuration, the tokens that end a response and how to sample; the weights
    are `state`.
    """
    set_generation_tokens(model, tokenizer)
    write_folder(model, state, tokenizer, folder)


def write_folder(
    model: PreTrainedModel,
    state: dict[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
) -> None:
    """Write a model of any kind with its generation config as it is; otherwise as `save_model`."""
    with filled_folder(folder) as staging:
        model.save_pretrained(staging, state_dict=state)
        tokenizer.save_pretrained(staging)


def parse_dtype(name: str, device: str, folder_dtype: torch.dtype | None = None) -> torch.dtype:
    """Return the dtype of a flag's value: `auto` is fp32 on a CPU, the checkpoint's elsewhere."""
    if name != "auto":
        return DTYPES[name]
    return torch.float32 if device == "cpu" or folder_dtype is None else folder_dtype


def parameter_count(model: torch.nn.Module) -> int:
    """Count parameters, tied ones once."""
    return sum(p.numel() for p in model.parameters())


def trainable_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """Parameters that train, and all of them; tied ones count once, packed ones as what they are.

    Four-bit weights are stored two to a byte.
    """
    trained = total = 0
    for weight in model.parameters():
        packed = 2 * weight.element_size() if type(weight).__name__ == "Params4bit" else 1
        total += weight.numel() * packed
        trained += weight.numel() if weight.requires_grad else 0
    return trained, total


def stop_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *others: int | None
) -> list[int]:
    """List the tokens that end a response: the generation config's, the tokenizer's and others."""
    configured = model.generation_config.eos_token_id if model.generation_config else None
    return merge_eos(configured, tokenizer.eos_token_id, *others)


def set_generation_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *others: int | None
) -> list[int]:
    """Put a tokenizer's tokens into the generation config, and all that end a response.

    Other settings, such as how to sample, are kept. Where transformers loads them and would refuse
    to save them, they are left out, and named.

    Returns:
        The tokens that end a response, sorted.
    """
    from transformers import GenerationConfig

    stops = stop_tokens(model, tokenizer, *others)
    tokens = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": stops[0] if len(stops) == 1 else stops or None,
        "pad_token_id": tokenizer.pad_token_id,
    }
    settings = _generation_settings(model) - tokens.keys()
    kept = {name: getattr(model.generation_config, name) for name in settings}
    config = GenerationConfig(**kept, **tokens)
    try:
        config.validate(strict=True)
    except ValueError:
        named = ", ".join(f"{name} {kept[name]}" for name in sorted(kept))
        log.warning(
            "left out of generation_config.json, since they contradict each other: %s", named
        )
        config = GenerationConfig(**tokens)
    model.generation_config = config
    return stops


def _generation_settings(model: PreTrainedModel) -> set[str]:
    """Names of what a generation_config.json sets; nothing where the model's is made up."""
    from transformers.generation.configuration_utils import METADATA_FIELDS

    config = model.generation_config
    if config is None or config.to_dict().get("_from_model_config"):
        return set()
    return {name for name in config.to_diff_dict() if name not in METADATA_FIELDS}


def merge_eos(*tokens: int | list[int] | None) -> list[int]:
    """Merge and sort several `eos_token_id`, each an id, a list or None."""
    lists = [token if isinstance(token, list) else [token] for token in tokens]
    return sorted({int(token) for ids in lists for token in ids if token is not None})


def _base_config(adapter: AdapterInfo) -> PreTrainedConfig:
    """Load the configuration of an adapter's base, with the rows that the adapter adds."""
    config = load_config(str(find_base(adapter)))
    text = config.get_text_config()
    text.vocab_size = max(text.vocab_size, max(adapter.rows, default=-1) + 1)
    return config


def grow_embeddings(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give every token of the tokenizer an embedding; a model that has more keeps them.

    New rows are drawn around the mean of the old ones with their covariance (Hewitt, 2021), so that
    no new token starts out likelier than all others. Random: seed before.
    """
    rows = max(tokenizer.get_vocab().values()) + 1
    if rows > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=True)


def context_size(config: PreTrainedConfig | PlainConfig) -> int | None:
    """Return the positions of a model; None where it has no limit."""
    text = config.get_text_config()
    return int(text.max_position_embeddings) if hasattr(text, "max_position_embeddings") else None

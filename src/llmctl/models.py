"""Build, load and save models and tokenizers: plain Hugging Face folders, nothing else."""

import logging
import re
import shutil
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from llmctl.errors import ModelError, NetworkError
from llmctl.files import follow_umask, replace_folder
from llmctl.rundir import resolve_model, resolve_tokenizer
from llmctl.vetting import (
    check_counts,
    check_files,
    check_shards,
    check_size,
    read_object,
    require_safetensors,
)

LoadIn = Literal["full", "8bit", "4bit"]
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
"""What the libraries raise for files that are damaged."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SAFE_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
DERIVED = (".inv_freq", ".masked_bias", ".attn.bias")
"""Buffers that old checkpoints carry and that models compute."""

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


def local_folder(reference: str) -> Path:
    """The folder of a run, of a path, or of a Hub id, downloaded (safetensors only) if need be.

    Raises:
        ModelError: no such folder, or a name that no Hub repository can have.
        NetworkError: the Hub cannot be reached, does not know it, or wants a login.
    """
    path = Path(reference).expanduser()
    if path.exists():
        return path
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", reference) or reference.startswith("."):
        raise ModelError("no such model folder", file=reference)
    try:
        return Path(huggingface_hub.snapshot_download(reference, allow_patterns=SAFE_FILES))
    except GatedRepoError:
        raise NetworkError(
            f"`{reference}` on the Hub wants a login", hint="run: hf auth login"
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise NetworkError(
            f"no folder `{reference}` here, and the Hub knows no such model",
            hint="check the spelling and the path",
        ) from None
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        offline = isinstance(error, OfflineModeIsEnabled) or huggingface_hub.is_offline_mode()
        raise NetworkError(
            f"no folder `{reference}` here, and the Hub "
            + ("is switched off (HF_HUB_OFFLINE)" if offline else "cannot be reached"),
            hint="pass the path of a run or a model folder",
        ) from None


def load_tokenizer(reference: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a tokenize run, a run, a folder or a Hub id.

    Raises:
        ModelError: there is none, or it wants to run code of its own.
    """
    folder = local_folder(resolve_tokenizer(reference))
    if not any((folder / n).exists() for n in ("tokenizer.json", "tokenizer_config.json")):
        raise ModelError("no tokenizer in this folder", file=folder)
    check_files(folder)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False
        )
    except (*BROKEN, ImportError) as error:
        raise ModelError(
            f"the tokenizer does not load: {_first_line(error)}", file=folder
        ) from None
    return tokenizer


def load_config(reference: str) -> PreTrainedConfig:
    """The configuration of a run, a folder or a Hub id.

    Raises:
        ModelError: there is none, it is broken, or it wants to run code of its own.
    """
    folder = local_folder(resolve_model(reference))
    if (folder / "adapter_config.json").exists():
        folder = _base_of(folder)
    if not (folder / "config.json").exists():
        raise ModelError("no config.json in this folder", file=folder)
    check_files(folder)
    raw = read_object(folder / "config.json")
    check_counts(raw, folder)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except BROKEN as error:
        if "trust_remote_code" in str(error) or "auto_map" in raw:
            raise ModelError(
                "this model wants to run Python code of its own, which llmctl never does",
                file=folder,
                hint="use a model of an architecture that transformers carries",
            ) from None
        raise ModelError(f"config.json does not load: {_first_line(error)}", file=folder) from None
    return config


def load_causal_lm(
    reference: str, *, dtype: torch.dtype, device: str = "cpu", load_in: LoadIn = "full"
) -> PreTrainedModel:
    """The causal language model of a run (full or adapter), a folder or a Hub id, in eval mode.

    Raises:
        ModelError: pickles only, remote code, or tensors that are missing, misshapen or not finite.
        NetworkError: a Hub id that cannot be had.
    """
    folder = local_folder(resolve_model(reference))
    if (folder / "adapter_config.json").exists():
        return _load_adapter(folder, dtype, device, load_in)
    config = load_config(str(folder))
    require_safetensors(folder)
    check_shards(folder, config)
    try:
        check_size(folder, config)
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            quantization_config=_bitsandbytes(config, load_in, dtype),
            device_map={"": device},
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            output_loading_info=True,
        )
    except BROKEN as error:
        raise ModelError(f"the model does not load: {_first_line(error)}", file=folder) from None
    _check_loaded(model, report, folder)
    return model.eval()


def save_model(
    model: PreTrainedModel,
    state: dict[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
) -> None:
    """Write a folder that `from_pretrained` opens, whole or not at all.

    Args:
        model: gives the configuration; its own weights are not read.
        state: the weights to write, by name.
        tokenizer: saved beside them.
        folder: where to; a sibling is filled first and renamed.
    """
    staging = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(staging, ignore_errors=True)
    model.save_pretrained(staging, state_dict=state)
    tokenizer.save_pretrained(staging)
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(staging)
    follow_umask(staging)
    replace_folder(staging, folder)


def parse_dtype(name: str, device: str, folder_dtype: torch.dtype | None = None) -> torch.dtype:
    """The type for `auto|fp32|bf16|fp16`: auto is fp32 on a CPU, the checkpoint's elsewhere."""
    if name != "auto":
        return DTYPES[name]
    return torch.float32 if device == "cpu" or folder_dtype is None else folder_dtype


def parameter_count(model: torch.nn.Module) -> int:
    """Parameters, tied ones counted once."""
    return sum(p.numel() for p in model.parameters())


def _check_loaded(model: PreTrainedModel, report: dict[str, Any], folder: Path) -> None:
    """Refuse what transformers only reports: tensors it made up; and weights not finite."""
    for problem in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        names = sorted(n for n in map(str, report[problem]) if not n.endswith(DERIVED))
        if names:
            what = problem.removesuffix("_keys")
            raise ModelError(f"{what} weights: {names[0]} (of {len(names)})", file=folder)
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not torch.isfinite(weight.sum()):
            raise ModelError(f"weights that are not finite: {name}", file=folder)


def _load_adapter(
    folder: Path, dtype: torch.dtype, device: str, load_in: LoadIn
) -> PreTrainedModel:
    """An adapter over its base, by PEFT's own class (the Auto class loses DoRA's magnitudes)."""
    require_safetensors(folder, "adapter_model.safetensors")
    from peft import PeftModel

    model = load_causal_lm(str(_base_of(folder)), dtype=dtype, device=device, load_in=load_in)
    try:
        return PeftModel.from_pretrained(model, folder).eval()
    except BROKEN as error:
        raise ModelError(f"the adapter does not load: {_first_line(error)}", file=folder) from None


def _base_of(adapter: Path) -> Path:
    """The folder of the model that an adapter was trained on."""
    check_files(adapter)
    name = read_object(adapter / "adapter_config.json").get("base_model_name_or_path")
    if not isinstance(name, str):
        raise ModelError("adapter_config.json names no base model", file=adapter)
    folder = local_folder(resolve_model(name))
    if (folder / "adapter_config.json").exists():
        raise ModelError("the base of this adapter is an adapter itself", file=adapter)
    return folder


def _bitsandbytes(config: PreTrainedConfig, load_in: LoadIn, dtype: torch.dtype) -> Any:
    """The quantization to load in, with bitsandbytes' CPU defects guarded.

    On CPUs with AVX512-BF16 its 4-bit layers repack their weights in place at the first forward in
    eval mode and are wrong afterwards; and NF4 dequantizes wrongly where a layer's input width is
    not a multiple of 64, so such layers stay as they are.
    """
    if load_in == "full":
        return None
    for noisy in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    import bitsandbytes.nn.modules as bitsandbytes_modules
    from transformers import BitsAndBytesConfig

    if load_in == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    bitsandbytes_modules.has_avx512bf16 = lambda: False
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head", *_odd_widths(config)],
    )


def _odd_widths(config: PreTrainedConfig) -> list[str]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module.in_features % 64
    ]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]

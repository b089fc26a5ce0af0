"""Write a GGUF file, whole or not at all, and read it back with transformers.

The reader of transformers is another's code than the writer here: what both agree on is right.
"""

from collections.abc import Collection
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from llmctl.console import log
from llmctl.errors import require_extra
from llmctl.files import fsync, staged, writing
from llmctl.gguf_file.architecture import ARCHITECTURES, architecture_metadata, check_architecture
from llmctl.gguf_file.tokenizer import adds_bos_eos, convert_tokenizer
from llmctl.models.loading import stop_tokens
from llmctl.runs.cards import license_of

if TYPE_CHECKING:
    from gguf import GGUFWriter

Kind = Literal["q8_0", "q4_0", "f16", "bf16", "f32"]
KINDS: tuple[Kind, ...] = get_args(Kind)
UNREAD = ("head_dim", "rope_parameters", "attention_bias", "mlp_bias")
"""Settings that transformers does not read from the file, for some or all architectures."""


@dataclass(frozen=True)
class GgufFile:
    """A file that was written."""

    bytes: int
    kept: tuple[str, ...]
    """Modules whose weights are in float16 instead of in blocks."""


def check_gguf(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a model or tokenizer that cannot be written as llama.cpp would read it.

    Raises:
        ModelError: naming what is in the way, and what can be written.
        ResourceError: the `gguf` package is not installed.
    """
    require_extra("gguf", "gguf", "writing GGUF files")
    check_architecture(config)
    convert_tokenizer(tokenizer, config.vocab_size)
    adds_bos_eos(tokenizer)


def write_gguf(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    kind: Kind,
    keep: Collection[str] = (),
) -> GgufFile:
    """Write a model and its tokenizer to one file, whole or not at all, in place of any before it.

    Matrices are of one kind, but for those of the modules to keep, which are in float16.

    Raises:
        ModelError: what `check_gguf` refuses, or a weight that its type cannot hold.
        ResourceError: the `gguf` package is not installed, or no space is left.
        OutputError: the file cannot be written.
    """
    check_gguf(model.config, tokenizer)
    from gguf import GGMLQuantizationType, GGUFWriter, size_label  # an extra

    from llmctl.gguf_file.tensors import BLOCKS, gguf_tensors

    matrix_type = GGMLQuantizationType[kind.upper()]
    tensors = list(gguf_tensors(model, matrix_type, keep))
    staging = staged(path)
    writer = GGUFWriter(staging, ARCHITECTURES[model.config.model_type])
    _describe(writer, model, kind)
    _add_tokens(writer, model, tokenizer)
    for tensor in tensors:
        writer.add_tensor_info(
            tensor.name, tensor.shape, tensor.dtype, tensor.size, raw_dtype=tensor.type
        )
    writer.add_size_label(size_label(*writer.get_total_parameter_count()))
    try:
        with writing(path):
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in tensors:
                writer.write_tensor_data(tensor.array())
            writer.close()
            fsync(staging)
            staging.replace(path)
            fsync(path.parent)
    finally:
        writer.close()
        staging.unlink(missing_ok=True)
    kept = [t for t in tensors if t.type == GGMLQuantizationType.F16 and matrix_type in BLOCKS]
    return GgufFile(
        path.stat().st_size,
        tuple(tensor.source.removesuffix(".weight") for tensor in kept),
    )


def read_back(path: Path, original: PreTrainedConfig) -> PreTrainedModel:
    """The model of a GGUF file, dequantized to float32, in eval mode.

    The configuration of the original gives what transformers does not read from the file.
    """
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    known = original.to_dict()
    config.update({name: known[name] for name in UNREAD if known.get(name) is not None})
    with redirect_stderr(StringIO()):  # its progress bar cannot be switched off
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, config=config, dtype=torch.float32
        )
    return model.eval()


def _describe(writer: "GGUFWriter", model: PreTrainedModel, kind: Kind) -> None:
    """Add the file's kind, and the sizes of the model."""
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    writer.add_type("model")
    folder = Path(model.config.name_or_path)
    in_run = folder.name in ("model", "adapter")  # which has the name
    if name := folder.parent.name if in_run else folder.name:
        writer.add_name(name)
    if licence := license_of(folder):
        writer.add_license(licence)
    file_type = "ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"
    writer.add_file_type(LlamaFileType[file_type])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    for key, value in architecture_metadata(model.config):
        key = f"{ARCHITECTURES[model.config.model_type]}.{key}"
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)


def _add_tokens(
    writer: "GGUFWriter", model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Add the vocabulary, the special tokens and the chat template."""
    converted = convert_tokenizer(tokenizer, model.config.vocab_size)
    if converted.caution:
        log.warning("llama.cpp may cut %s into other tokens than transformers", converted.caution)
    writer.add_tokenizer_model(converted.model)
    writer.add_tokenizer_pre(converted.pre)
    writer.add_token_list(converted.texts)
    writer.add_token_types(converted.types)
    if converted.scores is not None:
        writer.add_token_scores(converted.scores)
    if converted.merges is not None:
        writer.add_token_merges(converted.merges)
    if converted.space_prefix is not None:
        writer.add_add_space_prefix(converted.space_prefix)
    bos, eos = adds_bos_eos(tokenizer)
    writer.add_add_bos_token(bos)
    writer.add_add_eos_token(eos)
    stops = [token for token in stop_tokens(model, tokenizer) if token != tokenizer.eos_token_id]
    roles = (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
        (writer.add_eot_token_id, stops[0] if stops else None),
        (writer.add_eom_token_id, stops[1] if len(stops) > 1 else None),
    )
    for add, token in roles:
        if token is not None:
            add(token)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template is not None:
        writer.add_chat_template(template)

"""A model in; the tensors of its GGUF file, with names, order of rows and types, out."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from llmctl.errors import ModelError
from llmctl.gguf_file.architecture import ARCHITECTURES, AttentionHeads, heads_of, rope_factors

INTERLEAVED_ROPE = ("llama", "mistral")
"""Model types whose queries and keys llama.cpp rotates in neighbouring pairs."""

BLOCKS = (Type.Q8_0, Type.Q4_0)
"""Types in which weights share a scale."""


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file."""

    name: str
    """In the file."""

    source: str
    """In the model."""

    value: Tensor
    type: Type

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the file: bytes in a row for types of blocks."""
        shape = tuple(self.value.shape)
        if self.type in (Type.F32, Type.F16):
            return shape
        return gguf.quant_shape_to_byte_shape(shape, self.type)

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """Type of the array that is written."""
        plain = {Type.F32: np.float32, Type.F16: np.float16}
        return np.dtype(plain.get(self.type, np.uint8))

    @property
    def size(self) -> int:
        """Bytes."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def array(self) -> NDArray[np.generic]:
        """The values in the file's type.

        Raises:
            ModelError: one is larger than float16 holds, in which it is written.
        """
        with np.errstate(over="ignore"):  # refused below
            data = gguf.quantize(self.value.float().contiguous().numpy(force=True), self.type)
        if self.type == Type.F16 and not np.isfinite(data).all():
            raise ModelError(
                f"weights larger than float16 holds: {self.source}", hint="pass --gguf bf16"
            )
        return data


def gguf_tensors(model: PreTrainedModel, kind: Type, keep: Collection[str]) -> Iterator[GgufTensor]:
    """Yield the tensors of the file, in order; norms and biases stay in float32.

    Matrices of the modules to keep stay in float16, and so do those whose rows cannot be divided
    into blocks; with q4_0 the output layer has eight bits.

    Raises:
        ModelError: a tensor that llama.cpp's architecture lacks.
    """
    config = model.config
    named = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    architecture = named[ARCHITECTURES[config.model_type]]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    factors = rope_factors(config)
    if factors is not None:
        yield GgufTensor("rope_freqs.weight", "rope_parameters", factors, Type.F32)
    tied = is_tied(model)
    for source, value in model.state_dict().items():
        if tied and source == "lm_head.weight":
            continue
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ModelError(f"llama.cpp has no such tensor in {config.model_type}: {source}")
        if config.model_type in INTERLEAVED_ROPE:
            value = _interleave(source, value, heads_of(config))
        is_output = name == "output.weight" or (tied and name == "token_embd.weight")
        wanted = Type.Q8_0 if is_output and kind == Type.Q4_0 else kind
        if source.rpartition(".")[0] in keep and kind in BLOCKS:
            wanted = Type.F16
        yield GgufTensor(name, source, value, _supported_type(value, wanted))


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the output layer is the embedding."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def _supported_type(value: Tensor, wanted: Type) -> Type:
    """The nearest type that a tensor can have: llama.cpp takes vectors in float32 only."""
    if value.dim() == 1:
        return Type.F32
    return Type.F16 if value.shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0] else wanted


def _interleave(source: str, value: Tensor, heads: AttentionHeads) -> Tensor:
    """Put queries and keys in llama.cpp's order of rows; return other tensors as they are.

    transformers rotates row i of a head with row i + width / 2, llama.cpp with row i + 1.
    """
    layer = source.split(".")[-2]
    if layer not in ("q_proj", "k_proj"):
        return value
    count = heads.queries if layer == "q_proj" else heads.keys
    halves = value.reshape(count, 2, heads.width // 2, *value.shape[1:])
    return halves.transpose(1, 2).reshape(value.shape)

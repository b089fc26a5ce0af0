"""Config of `quantize`."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from llmctl.config.base import Also, Input
from llmctl.config.sections import PositiveCount, StageConfig

WAYS = "--bits 4, --bits 8, --dtype bf16 or --gguf q8_0"


class QuantizeConfig(StageConfig):
    """Make a model smaller, and measure what that costs."""

    makes: ClassVar = ("model", "tokenizer")

    model: Annotated[str, Also("model-name-or-path", "base-model"), Input("model")]
    """Model to make smaller: a run, folder or Hub id."""

    bits: PositiveInt | None = None
    """Bits of a weight, 4 or 8; by default 4 with bnb and 8 with torchao."""

    method: Annotated[Literal["bnb", "torchao"] | None, Also("quantization")] = None
    """Library that holds the weights, by default bnb. bnb: bitsandbytes, 4 bits (Dettmers et al.,
    2023, arXiv:2305.14314) or 8 (Dettmers et al., 2022, arXiv:2208.07339). torchao: 8 bits, or 4 on
    CUDA; an extra."""

    quant_type: Annotated[Literal["nf4", "fp4"], Also("bnb-4bit-quant-type")] = "nf4"
    """Values that 4 bits of bnb stand for: those of a normal distribution, or of a float."""

    double_quant: Annotated[bool, Also("bnb-4bit-use-double-quant")] = True
    """Round the scales of 4 bits of bnb as well."""

    dynamic: bool = False
    """Round activations to 8 bits too, each as it comes (torchao with 8 bits)."""

    dtype: Annotated[Literal["auto", "fp32", "bf16", "fp16"], Also("torch-dtype")] = "auto"
    """Type of the weights that are kept, by default the model's own; alone, of all weights."""

    gguf: Literal["q8_0", "q4_0", "f16", "bf16"] | None = None
    """Write a file for llama.cpp instead of a folder."""

    keep: Annotated[list[str], Also("modules-to-not-convert", "skip-modules")] = []
    """Layers to leave as they are (repeatable, or with commas): names as in the model, such as
    down_proj or layers.0. The output layer is always kept."""

    merge: Annotated[bool, Also("merge-adapter")] = False
    """Merge an adapter into its base first, and see that it says the same."""

    data: Annotated[list[str], Also("dataset", "dataset-name"), Input("data")] = []
    """Text to measure on (repeatable): txt or md, or rows as `sft` takes them. By default the
    validation data of the run, or of the run that it started from."""

    eval_tokens: PositiveCount = 16_384
    """Tokens of it to measure on, at most."""

    max_perplexity_increase: Annotated[NonNegativeFloat | None, Also("max-ppl-increase")] = None
    """Write nothing and exit with 8 where perplexity grows by more than this share, as in 0.05."""

    sample_tokens: Annotated[PositiveInt, Field(le=4096)] = 32
    """Tokens of each of three continuations before and after, which also time generation."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device to quantize and measure on."""

    threads: PositiveInt | None = None
    """CPU threads; by default the cores that this process may use."""

    @property
    def library(self) -> Literal["bnb", "torchao"] | None:
        """Library that holds the weights; None for a plain cast and for a GGUF file."""
        return self.method or ("bnb" if self.bits else None)

    @property
    def width(self) -> int | None:
        """Bits of a weight; None for a plain cast and for a GGUF file."""
        return self.bits or {"bnb": 4, "torchao": 8, None: None}[self.library]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.bits not in (None, 4, 8):
            raise ValueError(f"--bits: expected 4 or 8, got {self.bits}")
        if self.library is None and self.gguf is None and self.dtype == "auto":
            raise ValueError(f"say how small: {WAYS}")
        if self.gguf is not None:
            self.refuse(("bits", "method", "dtype"), "{} does not go with --gguf")
        if self.library != "bnb" or self.width != 4:
            self.refuse(("quant_type", "double_quant"), "{} goes with 4 bits of --method bnb")
        if self.dynamic and (self.library != "torchao" or self.width != 8):
            raise ValueError("--dynamic goes with --method torchao and 8 bits")
        if self.gguf in ("f16", "bf16"):
            self.refuse(["keep"], f"{{}} does not go with --gguf {self.gguf}, which has no blocks")
        if self.library is None and self.gguf is None:
            self.refuse(["keep"], "{} does not go with a plain cast")
        return self

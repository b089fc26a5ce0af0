"""Config of `pretrain`."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import PositiveFloat, PositiveInt, model_validator

from llmctl.config.base import Also, Fields, Input
from llmctl.config.finetuning import Samples
from llmctl.config.sections import (
    Batch,
    Compiled,
    Corpus,
    Evaluation,
    Length,
    NonNegativeCount,
    OpenFraction,
    Optimizer,
    Placement,
    PositiveCount,
    Resumable,
)

PRESETS = ("nano", "tiny", "mini", "small", "medium", "large", "1b", "3b", "8b")


class Shape(Fields):
    """The model to build; one way to say it, or none."""

    model: Annotated[str | None, Also("model-name-or-path", "base-model"), Input("model")] = None
    """Continue training this model: a run, folder or Hub id."""

    size: Literal[PRESETS] | None = None  # type: ignore[valid-type]
    """Preset from about 1M to 8B parameters; by default chosen by corpus and machine."""

    arch: Literal["llama", "gpt2", "qwen3", "mixtral"] = "llama"
    """Architecture that the dials or the preset are built as."""

    layers: Annotated[PositiveInt | None, Also("n-layer", "num-hidden-layers", "depth")] = None
    """Transformer blocks."""

    hidden: Annotated[PositiveInt | None, Also("n-embd", "hidden-size")] = None
    """Width of the model."""

    heads: Annotated[PositiveInt | None, Also("n-head", "num-attention-heads")] = None
    """Attention heads."""

    kv_heads: Annotated[PositiveInt | None, Also("num-key-value-heads")] = None
    """Heads of keys and values, shared by groups of query heads."""

    config_from: Annotated[str | None, Input("model")] = None
    """Build the untrained architecture of this folder or Hub id."""

    context: Annotated[PositiveInt | None, Also("block-size", "sequence-len", "max-seq-length")] = (
        None
    )
    """Tokens per training sequence."""


class TokenLength(Length):
    """Length of training, also in tokens; one of the four, by default by corpus and model."""

    tokens_budget: Annotated[PositiveCount | None, Also("max-tokens")] = None
    """Tokens to train on."""

    tokens_per_parameter: Annotated[PositiveFloat | None, Also("target-param-data-ratio")] = None
    """Tokens per parameter; 20 is compute-optimal (Hoffmann et al., 2022, arXiv:2203.15556)."""


class PretrainConfig(
    Corpus,
    Shape,
    TokenLength,
    Batch,
    Optimizer,
    Evaluation,
    Samples,
    Placement,
    Compiled,
    Resumable,
):
    """Train a causal language model from scratch, or continue one."""

    makes: ClassVar = ("model", "tokenizer")

    tokens: Annotated[str | None, Input("tokens")] = None
    """Token shards to train on: a `tokenize` run."""

    tokenizer: Annotated[str | None, Also("tokenizer-name-or-path"), Input("tokenizer")] = None
    """Tokenizer for --data: a run, folder or Hub id; by default the model's own."""

    optimizer: Annotated[Literal["auto", "adamw", "muon", "adamw-8bit"], Also("optim")] = "auto"
    """Update rule. auto: Muon from scratch, AdamW when continuing a model and under FSDP.
    Muon takes the matrices of the blocks, AdamW the rest; `lr` is on AdamW's scale for both."""

    momentum: OpenFraction = 0.95
    """Muon's momentum."""

    batch_tokens: Annotated[PositiveCount | None, Also("total-batch-size")] = None
    """Tokens per step over all devices, reached by accumulation."""

    eval_tokens: NonNegativeCount | None = None
    """Validation tokens to evaluate on, spread over the split; 0 takes the whole split. By default
    131,072, or fewer where four evaluations were more than a tenth of the run's work."""

    log_every: Annotated[PositiveInt | None, Also("logging-steps", "log-interval")] = None
    """Steps between lines of metrics; by default a hundredth of the run."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if bool(self.tokens) == bool(self.data):
            raise ValueError("give --tokens (a tokenize run) or --data (with --tokenizer)")
        if self.data and not (self.tokenizer or self.model):
            raise ValueError("--data needs --tokenizer: a tokenize run, folder or Hub id")
        if self.tokens:
            unused = sorted({*Corpus.model_fields, "tokenizer"} - {"data"})
            self.refuse(unused, "{} goes with --data, not with --tokens")
        dials = ("arch", "heads", "hidden", "kv_heads", "layers", "size")
        if self.model:
            unused = sorted([*dials, "config_from"])
            self.refuse(unused, "--model has its shape already: drop {}")
        if self.config_from:
            self.refuse(dials, "--config-from has its shape already: drop {}")
        self.at_most_one(*TokenLength.model_fields)
        self.at_most_one("grad_accum", "batch_tokens")
        self.check_schedule()
        return self

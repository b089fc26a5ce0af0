"""One config class per command."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import PositiveInt, model_validator

from llmctl.config.base import Also, Argument, Config, Fields, Flag
from llmctl.config.sections import (
    Batch,
    Checkpoints,
    Control,
    Corpus,
    Evaluation,
    Length,
    Optimizer,
    Placement,
    PositiveCount,
    Reporting,
    Sampling,
    StageConfig,
)

PRESETS = ("nano", "tiny", "mini", "small", "medium", "large", "1b", "3b", "8b")


class TokenizeConfig(Corpus, StageConfig):
    """Train a tokenizer and turn a corpus into token shards."""

    algorithm: Literal["bpe", "unigram", "wordpiece", "byte", "char"] = "bpe"
    """How text becomes tokens; byte and char need no training."""

    vocab_size: Annotated[PositiveCount | None, Also("vocabulary-size")] = None
    """Tokens in the vocabulary, special ones included; by default chosen by corpus size."""

    special_token: list[str] = []
    """Special token to add to the vocabulary (repeatable)."""

    min_frequency: PositiveInt = 2
    """Merge pairs, or keep pieces, that occur at least this often."""

    tokenizer: Annotated[str | None, Also("tokenizer-name-or-path")] = None
    """Use this tokenizer (a run, folder or Hub id) and only encode."""

    train_bytes: PositiveCount = 1_000_000_000
    """Bytes of text to train the tokenizer on, drawn across the corpus."""

    threads: Annotated[PositiveInt | None, Also("num-proc", "processes")] = None
    """CPU threads; by default one per core."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.data:
            raise ValueError(
                "--data is required: a file, folder, glob, Hub id or builtin:python-docs"
            )
        trained = {"algorithm", "vocab_size", "special_token", "min_frequency", "train_bytes"}
        if self.tokenizer and (clash := sorted(trained & self.given())):
            raise ValueError(f"--tokenizer reuses a tokenizer: drop {self.flag(clash[0])}")
        if self.algorithm == "byte" and self.vocab_size is not None:
            raise ValueError("--vocab-size does not go with --algorithm byte: it has 256 bytes")
        if "min_frequency" in self.given() and self.algorithm in ("byte", "char"):
            raise ValueError(f"--min-frequency does not go with --algorithm {self.algorithm}")
        if self.val_data and self.val_fraction is not None:
            raise ValueError("give --val-data or --val-fraction, not both")
        return self


class Shape(Fields):
    """The model to build; one way to say it, or none."""

    model: Annotated[str | None, Also("model-name-or-path", "base-model")] = None
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

    config_from: str | None = None
    """Build the untrained architecture of this folder or Hub id."""

    context: Annotated[PositiveInt | None, Also("block-size", "sequence-len", "max-seq-length")] = (
        None
    )
    """Tokens per training sequence."""


class PretrainConfig(
    Corpus, Shape, Length, Batch, Optimizer, Evaluation, Checkpoints, Placement, StageConfig
):
    """Train a causal language model from scratch, or continue one."""

    tokens: str | None = None
    """Token shards to train on: a `tokenize` run."""

    tokenizer: Annotated[str | None, Also("tokenizer-name-or-path")] = None
    """Tokenizer for --data: a run, folder or Hub id; by default the model's own."""

    log_every: Annotated[PositiveInt | None, Also("logging-steps", "log-interval")] = None
    """Steps between lines of metrics; by default a hundredth of the run."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = self.given()
        if bool(self.tokens) == bool(self.data):
            raise ValueError("give --tokens (a tokenize run) or --data (with --tokenizer)")
        if self.data and not (self.tokenizer or self.model):
            raise ValueError("--data needs --tokenizer: a tokenize run, folder or Hub id")
        if self.tokens and (
            clash := sorted({*Corpus.model_fields, "tokenizer"} & given - {"data"})
        ):
            raise ValueError(f"{self.flag(clash[0])} goes with --data, not with --tokens")
        dials = {"size", "arch", "layers", "hidden", "heads", "kv_heads"}
        if self.model and (clash := sorted({*dials, "config_from"} & given)):
            raise ValueError(f"--model has its shape already: drop {self.flag(clash[0])}")
        if self.config_from and (clash := sorted(dials & given)):
            raise ValueError(f"--config-from has its shape already: drop {self.flag(clash[0])}")
        lengths = [name for name in Length.model_fields if getattr(self, name) is not None]
        if len(lengths) > 1:
            raise ValueError(f"give {self.flag(lengths[0])} or {self.flag(lengths[1])}, not both")
        if self.grad_accum and self.batch_tokens:
            raise ValueError("give --grad-accum or --batch-tokens, not both")
        if "decay" in given and self.schedule != "wsd":
            raise ValueError("--decay goes with --schedule wsd")
        if "min_lr" in given and self.schedule == "constant":
            raise ValueError("--min-lr does not go with --schedule constant")
        return self


class GenerateConfig(Sampling, StageConfig):
    """Generate text from a model."""

    model: Annotated[str, Also("model-name-or-path", "base-model")]
    """Model to sample from: a run, folder or Hub id."""

    prompt: list[str] = []
    """Text to continue (repeatable); `""` starts from nothing. Without any, stdin is read."""

    prompts_file: Annotated[Path | None, Also("prompts")] = None
    """File of prompts: one per line of txt, or `prompt` (or `messages`) of each line of jsonl."""

    out: Annotated[Path | None, Flag("--out", "-o"), Also("output", "output-file"), Control] = None
    """Write rows of jsonl to this file."""

    num_samples: Annotated[PositiveInt, Also("num-return-sequences")] = 1
    """Responses for each prompt."""

    batch_size: PositiveInt = 64
    """Most sequences generated at once."""

    chat: bool = False
    """Put the prompt in the model's chat template, as a user's turn."""

    system: Annotated[str | None, Also("system-prompt")] = None
    """System message for --chat."""

    shots: Path | None = None
    """Few-shot examples set before each prompt: jsonl of `prompt` and `response`."""

    load_in_8bit: bool = False
    """Load the weights in 8 bits with bitsandbytes."""

    load_in_4bit: bool = False
    """Load the weights in 4 bits (NF4) with bitsandbytes."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device to run on."""

    dtype: Annotated[Literal["auto", "fp32", "bf16", "fp16"], Also("torch-dtype")] = "auto"
    """Type of the weights; auto takes the checkpoint's on a GPU and fp32 on a CPU."""

    threads: PositiveInt | None = None
    """CPU threads; by default chosen by model size."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.prompt and self.prompts_file:
            raise ValueError("give --prompt or --prompts-file, not both")
        if self.load_in_8bit and self.load_in_4bit:
            raise ValueError("give --load-in-8bit or --load-in-4bit, not both")
        if "" in self.stop:
            raise ValueError("--stop: expected some text, got ''")
        for text in (*self.prompt, *self.stop, self.system or ""):
            if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
                raise ValueError("a prompt that is not UTF-8")
        if self.system is not None and not self.chat:
            raise ValueError("--system goes with --chat")
        return self


class DemoConfig(StageConfig):
    """Tokenize, pretrain and generate on text that every Python carries."""

    max_steps: Annotated[PositiveCount, Also("steps")] = 400
    """Optimizer steps of the training part."""

    threads: PositiveInt | None = None
    """CPU threads; by default the cores that this process may use."""


class RunsConfig(Config, Reporting):
    """List runs: how they went, how far they are, how to resume them."""

    directory: Annotated[Path | None, Argument("DIR"), Control] = None
    """Directory to look in; by default runs/ where there is one, else the current directory."""

"""Config of `tokenize`."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import PositiveInt, model_validator

from llmctl.config.base import Also, Input
from llmctl.config.sections import Corpus, PositiveCount, StageConfig


class TokenizeConfig(Corpus, StageConfig):
    """Train a tokenizer and turn a corpus into token shards."""

    makes: ClassVar = ("tokens", "tokenizer")

    algorithm: Literal["bpe", "unigram", "wordpiece", "byte", "char"] = "bpe"
    """How text becomes tokens; byte and char need no training."""

    vocab_size: Annotated[PositiveCount | None, Also("vocabulary-size")] = None
    """Tokens in the vocabulary, special ones included; by default chosen by corpus size."""

    special_token: list[str] = []
    """Special token to add to the vocabulary (repeatable)."""

    min_frequency: PositiveInt = 2
    """Merge pairs, or keep pieces, that occur at least this often."""

    tokenizer: Annotated[str | None, Also("tokenizer-name-or-path"), Input("tokenizer")] = None
    """Use this tokenizer (a run, folder or Hub id) and only encode."""

    train_bytes: PositiveCount = 1_000_000_000
    """Bytes of text to train the tokenizer on, drawn across the corpus."""

    threads: Annotated[PositiveInt | None, Also("num-proc", "processes")] = None
    """CPU threads; by default one per core."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.require_field("data", "a file, folder, glob, Hub id or builtin:python-docs")
        if self.tokenizer:
            trained = ("algorithm", "min_frequency", "special_token", "train_bytes", "vocab_size")
            self.refuse(trained, "--tokenizer reuses a tokenizer: drop {}")
        if self.algorithm == "byte" and self.vocab_size is not None:
            raise ValueError("--vocab-size does not go with --algorithm byte: it has 256 bytes")
        if "min_frequency" in self.given() and self.algorithm in ("byte", "char"):
            raise ValueError(f"--min-frequency does not go with --algorithm {self.algorithm}")
        self.at_most_one("val_data", "val_fraction")
        return self

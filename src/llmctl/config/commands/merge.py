"""Config of `merge`."""

from typing import Annotated, ClassVar, Literal

from pydantic import PositiveInt

from llmctl.config.base import Also, Input
from llmctl.config.sections import StageConfig


class MergeConfig(StageConfig):
    """Merge an adapter into its base model."""

    makes: ClassVar = ("model", "tokenizer")

    model: Annotated[str, Also("adapter", "model-name-or-path"), Input("model", "reward")]
    """Adapter to merge: a run or a PEFT folder."""

    base: Annotated[str | None, Also("base-model"), Input("model")] = None
    """Base model; by default the one that the adapter names."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device to compare the logits on."""

    threads: PositiveInt | None = None
    """CPU threads; by default the cores that this process may use."""

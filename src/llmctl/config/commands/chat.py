"""Config of `chat`."""

from pathlib import Path
from typing import Annotated, Self

from pydantic import PositiveInt, model_validator

from llmctl.config.base import Also, Flag
from llmctl.config.sections import Control, QuickLoading, Sampling, StageConfig, require_utf8


class ChatConfig(QuickLoading, Sampling, StageConfig):
    """Talk with a model in the terminal."""

    system: Annotated[str | None, Also("system-prompt")] = None
    """System message."""

    context: Annotated[PositiveInt | None, Also("context-size", "ctx-size")] = None
    """Tokens of history and reply at most; by default the model's context."""

    max_new_tokens: Annotated[PositiveInt, Also("max-tokens", "n-predict")] = 1024
    """Most tokens of a reply."""

    out: Annotated[Path | None, Flag("--out", "-o"), Also("output", "output-file"), Control] = None
    """Save the conversation to this file when it ends: a row of `messages` that sft reads."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        require_utf8(self.system or "")
        return self

"""Config of `generate`."""

from pathlib import Path
from typing import Annotated, ClassVar, Self

from pydantic import PositiveInt, model_validator

from llmctl.config.base import Also, Flag, Input
from llmctl.config.sections import Control, QuickLoading, Sampling, StageConfig, require_utf8


class GenerateConfig(QuickLoading, Sampling, StageConfig):
    """Generate text from a model."""

    makes: ClassVar = ("data",)

    prompt: list[str] = []
    """Text to continue (repeatable); `""` starts from nothing. Without any, stdin is read."""

    prompts_file: Annotated[Path | None, Also("prompts"), Input("data")] = None
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

    shots: Annotated[Path | None, Input("data")] = None
    """Few-shot examples set before each prompt: jsonl of `prompt` and `response`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.at_most_one("prompt", "prompts_file")
        require_utf8(*self.prompt, self.system or "")
        if self.system is not None and not self.chat:
            raise ValueError("--system goes with --chat")
        return self

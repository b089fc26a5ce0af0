"""Config of `audit`."""

from typing import Annotated, Self

from pydantic import Field, PositiveInt, model_validator

from llmctl.config.base import Also, Argument, Config
from llmctl.config.finetuning import Supervised
from llmctl.config.sections import Reporting


class AuditConfig(Supervised, Config, Reporting):
    """Check examples as `sft` would see them."""

    data: Annotated[list[str], Argument("DATA")] = []
    """Examples: files of jsonl, json, csv or parquet, Hub data sets, or `builtin:tasks`."""

    model: Annotated[str, Also("model-name-or-path", "base-model", "tokenizer")]
    """Model whose tokenizer and template to use: a run, folder or Hub id."""

    example: PositiveInt | None = None
    """Example to show, by its number among those that train; by default one of each shape."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Chooses the examples, where weights leave some out."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.require_field("data", "jsonl, json, csv, parquet, a Hub id or builtin:tasks")
        return self

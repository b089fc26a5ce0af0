"""Config of `sft`."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import model_validator

from llmctl.config.base import Also, Input
from llmctl.config.finetuning import Adapter, Samples, Supervised, Tuning


class SftConfig(Supervised, Adapter, Tuning, Samples):
    """Fine-tune a model on examples, in full or with adapters."""

    makes: ClassVar = ("model", "tokenizer")

    model: Annotated[str, Also("model-name-or-path", "base-model"), Input("model")]
    """Model to fine-tune: a run, folder or Hub id."""

    data: Annotated[list[str], Also("dataset", "dataset-name"), Input("data")] = []
    """Examples (repeatable): a file of jsonl, json, csv or parquet, a Hub data set, or
    `builtin:tasks`; `a.jsonl=0.7` gives it that weight in the mixture."""

    task: Literal["chat", "classify"] = "chat"
    """Learn to answer, or to tell labels (columns `text` and `label`)."""

    packing: bool = False
    """Put several examples into one sequence, kept apart by their positions."""

    chunked_loss: bool = False
    """Compute the loss a few positions at a time, and never hold all logits."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.require_field("data", "jsonl, json, csv, parquet, a Hub id or builtin:tasks")
        if self.task == "classify":
            unused = (
                *("chat_template", "train_on", "packing", "chunked_loss", "prompt_tuning"),
                *("load_in_4bit", "load_in_8bit", *Samples.model_fields),
            )
            self.refuse(unused, "{} does not go with --task classify")
        if self.packing and (self.prompt_tuning or self.group_by_length):
            other = "--prompt-tuning" if self.prompt_tuning else "--group-by-length"
            raise ValueError(f"--packing does not go with {other}")
        return self

"""Config of `dpo`."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, PositiveFloat, model_validator

from llmctl.config.base import Also, Input
from llmctl.config.finetuning import Adapter, Preferred, Samples, Tuning

PairLoss = Literal["sigmoid", "ipo"]


class DpoConfig(Preferred, Adapter, Tuning, Samples):
    """Align a model with preferences directly, without a reward model."""

    makes: ClassVar = ("model", "tokenizer")

    model: Annotated[str, Also("model-name-or-path", "base-model", "ref-model"), Input("model")]
    """Model to start from, and reference to stay near: a run, folder or Hub id."""

    data: Annotated[list[str], Also("dataset", "dataset-name"), Input("data")] = []
    """Preferences (repeatable): a file of jsonl, json, csv or parquet, a Hub data set, or
    `builtin:preferences`; `a.jsonl=0.7` gives it that weight in the mixture."""

    loss: Annotated[PairLoss, Also("loss-type", "pref-loss")] = "sigmoid"
    """Loss of a pair: sigmoid is DPO's own (Rafailov et al., 2023, arXiv:2305.18290, equation 7),
    ipo a square that keeps the margin finite (Azar et al., 2023, arXiv:2310.12036, equation 17)."""

    beta: Annotated[PositiveFloat, Also("pref-beta", "dpo-beta")] = 0.1
    """How dear it is to leave the reference: less lets the model go further. The tau of ipo."""

    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of the labels taken to be wrong, with the loss sigmoid (conservative DPO)."""

    lr: Annotated[PositiveFloat | None, Also("learning-rate")] = None
    """Peak learning rate; by default a tenth of what `sft` takes for the size."""

    epochs: Annotated[PositiveFloat | None, Also("num-train-epochs", "num-epochs")] = None
    """Passes over the pairs; by default 1."""

    chunked_loss: bool = False
    """Compute log-probabilities a few positions at a time, and never hold all logits."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.require_field("data", "jsonl, json, csv, parquet, a Hub id or builtin:preferences")
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError("--label-smoothing goes with --loss sigmoid")
        if self.prompt_tuning:
            raise ValueError(
                "--prompt-tuning starts as another model than the reference: use --lora"
            )
        if self.lora_dropout:
            raise ValueError(
                "--lora-dropout does not go with dpo, which compares two models without noise"
            )
        return self

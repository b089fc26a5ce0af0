"""Config of `reward`."""

from pathlib import Path
from typing import Annotated, ClassVar, Self

from pydantic import NonNegativeFloat, model_validator

from llmctl.config.base import Also, Input
from llmctl.config.finetuning import Preferred, Tuning
from llmctl.config.sections import Control, ScoreAt

SCORING = (
    *(
        "model",
        "score",
        "score_at",
        "batch_size",
        "device",
        "threads",
        "seed",
        "out",
        "overwrite",
        "dry_run",
    ),
    *("as_json", "quiet", "verbose", "debug"),
)
"""Fields that `--score` uses."""


class RewardConfig(Preferred, Tuning):
    """Train a reward model on preferences, or score texts with one."""

    makes: ClassVar = ("reward", "tokenizer")

    model: Annotated[str, Also("model-name-or-path", "base-model"), Input("model", "reward")]
    """Model to start from, a decoder or an encoder such as BERT, or the one to score with: a run,
    folder or Hub id."""

    data: Annotated[list[str], Also("dataset", "dataset-name"), Input("data")] = []
    """Preferences (repeatable): a file of jsonl, json, csv or parquet, a Hub data set, or
    `builtin:preferences`; `a.jsonl=0.7` gives it that weight in the mixture."""

    margin: bool = True
    """Ask for a difference of at least the row's `margin`, where there is such a column (Touvron
    et al., 2023, arXiv:2307.09288)."""

    center_rewards: Annotated[NonNegativeFloat, Also("center-rewards-coefficient")] = 0.0
    """Weight of the squared sum of a pair's scores in the loss, which keeps scores around 0
    (Eisenstein et al., 2023, arXiv:2312.09244); 0.01 is common."""

    score: Annotated[Path | None, Control] = None
    """Train nothing: score the texts of this file, jsonl with `prompt` and `response`, `messages`,
    `text`, or pairs. Rows with a `score` go to stdout, or to `--out FILE`."""

    score_at: Annotated[ScoreAt | None, Control] = None
    """Token that `score` reads: the end of the last turn, where llmctl trains it, or the last one
    that the chat template writes, where TRL does. By default what the model's config.json records
    as `score_at`, else the end of the turn."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.score is None:
            self.refuse(("score_at",), "{} goes with --score")
            self.require_field("data", "jsonl, json, csv, parquet, a Hub id or builtin:preferences")
        else:
            unused = [name for name in type(self).model_fields if name not in SCORING]
            self.refuse(unused, "{} does not go with --score")
        return self

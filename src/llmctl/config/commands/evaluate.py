"""Config of `evaluate`."""

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, NonNegativeFloat, PositiveInt, model_validator

from llmctl.config.base import Also, Fields, Input
from llmctl.config.gates import split_gate
from llmctl.config.sections import (
    Control,
    Loading,
    NonNegativeCount,
    PositiveCount,
    Sampling,
    ScoreAt,
    StageConfig,
)

METRICS = ("perplexity", "rouge", "bleu", "chrf", "wer", "exact", "accuracy", "f1")
GENERATED = METRICS[1:]
"""Metrics of generated responses, which take references."""


def _listed(value: Any) -> Any:
    """Parse `rouge,bleu` into a list, also where the flag is repeated."""
    if not isinstance(value, list):
        return value
    parts = [part.strip() for text in value for part in str(text).split(",")]
    return [part for part in parts if part]


class Measures(Fields):
    """Metrics, and gates on them."""

    metrics: Annotated[list[str], BeforeValidator(_listed), Also("metric")] = []
    """Figures to compute, `rouge,exact` or repeated: perplexity; of answers rouge, bleu, chrf, wer,
    exact; of labels accuracy and f1. By default perplexity, of labelled texts accuracy and f1."""

    answer_regex: Annotated[str | None, Also("regex")] = None
    """Take the last match of this, or of its first group, from response and reference before exact,
    accuracy and f1 look at them; where both are numbers, they are compared as such."""

    labels: Annotated[list[str], BeforeValidator(_listed)] = []
    """Labels to look for in responses (accuracy, f1); by default those of the references."""

    require: Annotated[list[str], Also("gate")] = []
    """What must hold (repeatable), such as `exact>=0.9` or `perplexity<20`; else the exit code is
    8."""


class Questions(Fields):
    """Few-shot examples and format of prompts."""

    shots: Annotated[NonNegativeCount | None, Also("num-fewshot", "few-shot")] = None
    """Examples set before each prompt: rows of the data, which are then not evaluated, or of
    `shots-data`; the seed chooses them. By default none; with `tasks`, as the task says."""

    shots_data: Annotated[list[str], Input("data")] = []
    """Rows to take the examples from (repeatable); a row is never its own example."""

    columns: Annotated[list[str], Also("column")] = []
    """What the columns hold, where their names do not tell (repeatable): `prompt=q,response=a`.
    Roles: messages, prompt, response, system, text, label."""

    plain: bool = False
    """Put prompts as plain text, also where the model has a chat template."""

    system: Annotated[str | None, Also("system-prompt")] = None
    """System message before each prompt."""

    skip_bad_rows: NonNegativeCount = 0
    """Leave out up to this many rows that cannot be read, and count them."""


class Reading(Fields):
    """Windows over texts, for perplexity."""

    text_column: Annotated[str, Also("text-field", "dataset-text-field")] = "text"
    """Column that holds the text in jsonl, csv, parquet and Hub data."""

    context: Annotated[PositiveCount | None, Also("max-length", "block-size")] = None
    """Tokens that the model reads at a time; by default its context, at most 2,048."""

    stride: PositiveCount | None = None
    """Tokens from one window to the next; by default half the context. The whole context is
    quickest, and what pretraining's validation does."""

    end: Annotated[bool, Also("score-eos")] = True
    """Predict also the token that ends each text, as pretraining does."""


class Tasks(Fields):
    """Benchmarks of lm-eval."""

    tasks: Annotated[list[str], BeforeValidator(_listed), Also("task")] = []
    """Tasks of lm-eval, `mmlu,gsm8k` or repeated, in place of `data`."""

    task_path: Annotated[list[Path], Also("include-path"), Input()] = []
    """Folder of task YAMLs of your own (repeatable)."""


class Comparison(Fields):
    """A second model, and a reward model that scores both."""

    compare: Annotated[str | None, Also("against"), Input("model")] = None
    """Second model on the same data: differences are `model` less this one."""

    reward_model: Annotated[str | None, Also("judge"), Input("reward")] = None
    """Reward model that scores the responses: a run, folder or Hub id."""

    score_at: ScoreAt | None = None
    """Token that the reward model is read at, as in `llmctl reward --score`; by default what its
    folder records, else the end of the turn."""


class EvaluateConfig(
    Loading, Measures, Questions, Reading, Tasks, Comparison, Sampling, StageConfig
):
    """Measure a model on texts, on questions with answers or on benchmarks; compare two."""

    data: Annotated[list[str], Also("dataset", "dataset-name"), Input("data")] = []
    """What to measure on (repeatable): text (txt, md), or rows (jsonl, json, csv, parquet) of
    `text`, of prompts and references as `sft` reads them, or of `text` and `label`."""

    limit: PositiveCount | None = None
    """Evaluate this many rows, the first ones."""

    batch_size: PositiveInt = 16
    """Most sequences that are generated or classified at once."""

    temperature: NonNegativeFloat = 0.0
    """Softmax temperature; 0 takes the most likely token."""

    resume: Annotated[bool, Control] = False
    """Continue the run of `--out` after its last row; start afresh where there is none."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if bool(self.data) == bool(self.tasks):
            raise ValueError("give --data (texts or rows) or --tasks (benchmarks), one of them")
        for name in self.metrics:
            if name not in METRICS:
                close = difflib.get_close_matches(name, METRICS, n=1)
                known = f"did you mean {close[0]}?" if close else f"there is {', '.join(METRICS)}"
                raise ValueError(f"--metrics: no metric `{name}`: {known}")
        if self.answer_regex is not None:
            try:
                re.compile(self.answer_regex)
            except re.error as error:
                raise ValueError(f"--answer-regex: no regular expression: {error}") from None
        for text in self.require:
            if split_gate(text) is None:
                raise ValueError(f"--require {text}: expected FIGURE>=NUMBER, such as exact>=0.9")
        return self

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.resume and self.out is None:
            raise ValueError("--resume goes with --out, the run to continue")
        if self.shots_data and not self.shots:
            raise ValueError("--shots-data goes with --shots")
        if self.task_path and not self.tasks:
            raise ValueError("--task-path goes with --tasks")
        if self.reward_model is None:
            self.refuse(("score_at",), "{} goes with --reward-model")
        clash = (
            *("metrics", "answer_regex", "labels", "columns", "shots_data", "reward_model"),
            *("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"),
            *("greedy", "stop", "text_column", "stride", "end", "skip_bad_rows"),
        )
        if self.tasks:
            self.refuse(clash, "{} goes with --data")
        if self.stride and self.context and self.stride > self.context:
            raise ValueError(f"--stride {self.stride}: more than --context {self.context}")
        return self

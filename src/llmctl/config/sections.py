"""Groups of fields that several commands share; a class's name is its panel in `--help`."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from llmctl.config.base import Also, Config, Count, Fields, Flag, Input

Fraction = Annotated[float, Field(ge=0, le=1)]
OpenFraction = Annotated[float, Field(ge=0, lt=1)]
PositiveCount = Annotated[Count, Field(gt=0)]
NonNegativeCount = Annotated[Count, Field(ge=0)]
Control = Field(exclude=True)
"""Marks a field that steers one call and is no part of the recipe."""


ScoreAt = Literal["end-of-turn", "last-token"]
"""Last token of a scored conversation: the end of its last turn, or the last that is written."""


def split_names(value: Any) -> Any:
    """Parse `q_proj,v_proj`, or a list of such texts, into names; other values stay."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list):
        return value
    return [name for text in texts for part in str(text).split(",") if (name := part.strip())]


def _names(value: Any) -> Any:
    """Parse `lr,max-steps` into field names."""
    names = split_names(value)
    return [name.replace("-", "_") for name in names] if isinstance(names, list) else names


def _tracker_names(value: Any) -> Any:
    """Parse `tensorboard,wandb` into names; `none` disables tracking."""
    parts = [value] if isinstance(value, str) else value
    if not isinstance(parts, list):
        return value
    names = [name.strip() for part in parts for name in str(part).split(",")]
    return list(dict.fromkeys(name for name in names if name not in ("", "none")))


def require_utf8(*texts: str) -> None:
    """Refuse texts of bytes that are not UTF-8, which the command line holds as surrogates.

    Raises:
        ValueError: such a text.
    """
    for text in texts:
        if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
            raise ValueError("a text that is not UTF-8")


class Reporting(Fields):
    """Printed output of a command."""

    as_json: Annotated[bool, Flag("--json"), Control] = False
    """Print the result, or the error, as one JSON object."""

    quiet: Annotated[bool, Flag("--quiet", "-q"), Control] = False
    """Print errors only."""

    verbose: Annotated[bool, Flag("--verbose", "-v"), Control] = False
    """Print details too."""

    debug: Annotated[bool, Control] = False
    """Keep the traceback of an error."""


class Output(Reporting):
    """Where a command writes."""

    out: Annotated[
        Path | None, Flag("--out", "-o"), Also("output-dir", "out-dir", "output"), Control
    ] = None
    """Run directory to create."""

    overwrite: Annotated[bool, Control] = False
    """Replace what llmctl wrote to a finished run directory; other files stay."""

    dry_run: Annotated[bool, Control] = False
    """Check everything, print the resolved recipe and the plan, write nothing."""


class StageConfig(Config, Output):
    """Fields of every command."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seeds every random choice."""


class Corpus(Fields):
    """Raw text."""

    data: Annotated[list[str], Also("dataset", "dataset-name"), Input("data")] = []
    """Text to read (repeatable): a file (txt, md, jsonl, json, csv, tsv, parquet, arrow, also .gz,
    .zst, .xz or .bz2), a folder, a glob, a Hub data set, `builtin:python-docs`, or `-` for stdin.
    """

    text_column: Annotated[str, Also("text-field", "dataset-text-field")] = "text"
    """Column that holds the text in jsonl, csv, parquet and Hub data."""

    val_fraction: OpenFraction | None = None
    """Share of the documents kept for validation; by default 0.1, less where that is over 10 MB.
    A single document is split by position."""

    val_data: Annotated[list[str], Input("data")] = []
    """Validation text from elsewhere (repeatable), in place of a share of the data."""

    skip_bad_rows: NonNegativeCount = 0
    """Rows that cannot be read and may be left out; one more is an error."""


class Optimizer(Fields):
    """Update rule and learning-rate schedule."""

    lr: Annotated[PositiveFloat | None, Also("learning-rate")] = None
    """Peak learning rate; by default chosen by model size."""

    schedule: Annotated[
        Literal["cosine", "linear", "constant", "wsd"], Also("lr-scheduler-type", "lr-scheduler")
    ] = "cosine"
    """Decay after warm-up; wsd holds the peak and decays linearly over the last `decay` share."""

    warmup: Annotated[NonNegativeFloat, Also("warmup-steps", "warmup-ratio")] = 0.05
    """Warm-up: a share of all steps if below 1, else a number of steps."""

    decay: Fraction = 0.2
    """Share of all steps that the decay of wsd takes."""

    min_lr: Annotated[Fraction, Also("min-lr-rate")] = 0.1
    """Learning rate at the end, as a share of the peak (wsd and linear and cosine)."""

    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay, on matrices only."""

    beta1: Annotated[OpenFraction, Also("adam-beta1")] = 0.9
    """AdamW's decay of the first moment."""

    beta2: Annotated[OpenFraction, Also("adam-beta2")] = 0.95
    """AdamW's decay of the second moment."""

    max_grad_norm: Annotated[NonNegativeFloat, Also("grad-clip", "gradient-clip-val")] = 1.0
    """Clip the global gradient norm to this; 0 does not clip."""

    on_nan: Literal["stop", "skip"] = "stop"
    """A step whose loss or gradient is NaN or infinite ends the run, or is counted and skipped."""

    max_nan_skips: NonNegativeInt = 10
    """Skipped steps after which the run ends all the same."""

    @model_validator(mode="after")
    def _check_nan(self) -> Self:
        if self.on_nan == "stop":
            self.refuse(["max_nan_skips"], "{} goes with --on-nan skip")
        return self

    def check_schedule(self) -> None:
        """Refuse fields that the schedule does not read.

        Raises:
            ValueError: such a field.
        """
        if self.schedule != "wsd":
            self.refuse(["decay"], "{} goes with --schedule wsd")
        if self.schedule == "constant":
            self.refuse(["min_lr"], "{} does not go with --schedule constant")


class Batch(Fields):
    """Data of a step."""

    batch_size: Annotated[
        PositiveInt | None,
        Also("per-device-train-batch-size", "micro-batch-size", "device-batch-size"),
    ] = None
    """Sequences per forward pass on one device; by default chosen by model size."""

    grad_accum: Annotated[PositiveInt | None, Also("gradient-accumulation-steps")] = None
    """Forward passes per step; by default 1."""

    find_batch_size: Annotated[bool, Also("auto-find-batch-size", "probe-batch-size")] = False
    """Try on a throwaway copy of the model how large a batch fits, before training; accumulation
    makes up for what does not, so that a step keeps its size."""


class Compiled(Fields):
    """Trade a slow start for speed."""

    compile: Annotated[bool, Also("torch-compile")] = False
    """Compile the model with torch.compile; pays on a GPU."""


class Length(Fields):
    """Length of training in steps or epochs."""

    max_steps: Annotated[PositiveCount | None, Also("num-iterations", "steps")] = None
    """Optimizer steps."""

    epochs: Annotated[PositiveFloat | None, Also("num-train-epochs", "num-epochs")] = None
    """Passes over the training data."""


class Evaluation(Fields):
    """Validation while training."""

    eval_every: Annotated[PositiveInt | None, Also("eval-steps", "eval-interval")] = None
    """Steps between evaluations; by default a tenth of the run, or as many more as keep evaluation
    within a tenth of its work. The last step is always followed by one."""

    early_stop: Annotated[PositiveInt | None, Also("patience", "early-stopping-patience")] = None
    """Stop after this many evaluations without a better validation loss."""


class Checkpoints(Fields):
    """Saving and resuming."""

    save_every: Annotated[PositiveInt | None, Also("save-steps", "save-interval")] = None
    """Steps between checkpoints; by default a tenth of the run."""

    keep: Annotated[PositiveInt, Also("save-total-limit")] = 2
    """Newest checkpoints to keep, at least 2; the best one is kept besides."""

    resume: Annotated[bool, Control] = False
    """Continue from the newest valid checkpoint of `--out`; start afresh where there is none."""

    resume_from: Annotated[Path | None, Also("resume-from-checkpoint"), Control] = None
    """Continue from this checkpoint, or the newest of this run; with `resume`, only where `--out`
    has none of its own."""

    resume_allow: Annotated[
        list[str], BeforeValidator(_names), Also("resume-allow-changes"), Control
    ] = []
    """Settings that may differ from the resumed run's, such as `lr,max_steps`."""

    @model_validator(mode="after")
    def _check_resume(self) -> Self:
        if self.resume_allow and not (self.resume or self.resume_from):
            raise ValueError("--resume-allow goes with --resume or --resume-from")
        return self


class Trackers(Fields):
    """Experiment trackers."""

    report_to: Annotated[
        list[Literal["tensorboard", "trackio", "wandb"]],
        BeforeValidator(_tracker_names),
        Also("tracker", "trackers", "logger"),
    ] = []
    """Trackers that get what metrics.jsonl gets, with commas between; by default none."""


class Resumable(Checkpoints, Trackers, StageConfig):
    """Fields of every command that trains."""


class Placement(Fields):
    """Devices, numbers and processes."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device to run on."""

    precision: Literal["auto", "fp32", "bf16", "pure-bf16"] = "auto"
    """Numbers in the forward and backward pass; weights stay in float32 but for pure-bf16.
    auto: bf16 where the device has it and the model is large enough to gain."""

    threads: PositiveInt | None = None
    """CPU threads; by default the cores that this process may use."""

    processes: Annotated[PositiveInt | None, Also("nproc-per-node", "num-processes")] = None
    """Processes to train with; more than one are launched here unless a launcher already did."""

    peer_timeout: PositiveInt = 600
    """Seconds without an answer from another process after which a run ends, to be resumed; more
    than rank 0 takes to write a checkpoint or the result, for which the others wait."""


class Loading(Fields):
    """A model to use, and how to load it."""

    model: Annotated[str, Also("model-name-or-path", "base-model"), Input("model")]
    """Model: a run, folder or Hub id, which `owner/name@revision` pins."""

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
    def _check_loading(self) -> Self:
        self.at_most_one("load_in_8bit", "load_in_4bit")
        return self


class QuickLoading(Loading):
    """A model to use that may be loaded without transformers' code of models."""

    check: bool = False
    """Load the model with transformers, and trust the fast forward pass only where it gives the
    same logits, also for models whose kind has been compared before."""


class Sampling(Fields):
    """Sampling of the next token."""

    max_new_tokens: Annotated[PositiveInt, Also("max-tokens", "n-predict")] = 256
    """Most tokens to generate for a prompt."""

    temperature: NonNegativeFloat = 0.8
    """Softmax temperature; 0 takes the most likely token."""

    top_k: NonNegativeInt = 0
    """Sample among this many most likely tokens; 0 among all."""

    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Sample among the most likely tokens that together hold this probability."""

    min_p: Fraction = 0.0
    """Sample among tokens at least this probable relative to the most likely one."""

    repetition_penalty: PositiveFloat = 1.0
    """Divide the logits of tokens already seen by this; 1 does nothing."""

    greedy: bool = False
    """Take the most likely token, whatever the temperature."""

    stop: Annotated[list[str], Also("stop-strings")] = []
    """Text or special token that ends a response (repeatable); it is not part of the response."""

    @model_validator(mode="after")
    def _check_stop(self) -> Self:
        if "" in self.stop:
            raise ValueError("--stop: expected some text, got ''")
        require_utf8(*self.stop)
        return self


class Stages(Config, Output):
    """Stages of a life cycle to run."""

    out: Annotated[
        Path | None, Flag("--out", "-o"), Also("output-dir", "out-dir", "output"), Control
    ] = None
    """Directory for the runs of all stages; by default the recipe's `out`, else runs/ and the
    recipe's name."""

    overwrite: Annotated[bool, Control] = False
    """Run every stage anew, also where nothing has changed."""

    dry_run: Annotated[bool, Control] = False
    """Check every stage against the results of those before it, print what would be done, write
    nothing."""

    from_stage: Annotated[str | None, Flag("--from"), Control] = None
    """Begin at this stage: those before it are taken as they are, it and what builds on it run
    anew."""

    only: Annotated[str | None, Control] = None
    """Run this stage alone, on what the others left."""

    seed: Annotated[int | None, Field(ge=0, lt=2**32), Control] = None
    """Seed of every stage, in place of the recipe's."""

    threads: Annotated[PositiveInt | None, Control] = None
    """CPU threads of every stage, in place of the recipe's."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.from_stage and self.only:
            raise ValueError("give --from or --only, not both")
        if self.overwrite and self.only:
            raise ValueError("--overwrite runs every stage anew: use --from, or drop --only")
        return self

"""Groups of fields of the commands that fine-tune: data, adapters, memory, training."""

from typing import Annotated, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from llmctl.config.base import Also, Fields, Input
from llmctl.config.sections import (
    Batch,
    Compiled,
    Evaluation,
    Fraction,
    Length,
    NonNegativeCount,
    OpenFraction,
    Optimizer,
    Placement,
    PositiveCount,
    Resumable,
    split_names,
)


class Examples(Fields):
    """Rows to learn from, how they become tokens, and which of them validate."""

    columns: Annotated[list[str], Also("column")] = []
    """What the columns hold, where their names do not tell (repeatable): `prompt=q,response=a`.
    Roles: messages, prompt, response, system, text, label."""

    chat_template: Annotated[str | None, Also("chat-template-path", "template"), Input()] = None
    """Chat template: a jinja file, or a name such as chatml. By default the model's own; a base
    model without one gets ChatML."""

    max_length: Annotated[
        PositiveCount | None, Also("max-seq-length", "cutoff-len", "sequence-len")
    ] = None
    """Longest example in tokens; by default the model's context, at most 2,048."""

    val_size: NonNegativeCount | None = None
    """Examples to hold out: those with the smallest hashes. By default a tenth, at most 500; 0
    holds out none."""

    val_fraction: OpenFraction | None = None
    """Share of the examples to hold out."""

    val_data: Annotated[list[str], Input("data")] = []
    """Validation examples from elsewhere (repeatable)."""

    skip_bad_rows: NonNegativeCount = 0
    """Leave out up to this many rows that cannot be read, and count them."""

    @model_validator(mode="after")
    def _check_examples(self) -> Self:
        self.at_most_one("val_size", "val_fraction", "val_data")
        return self


class Supervised(Examples):
    """Tokens that count in the loss, and truncation."""

    train_on: Literal["assistant", "completion", "prompt", "all"] = "assistant"
    """Tokens that count in the loss: every turn of the assistant, its last turn only, everything
    but its turns, or all. Plain text counts whole."""

    truncation: Literal["auto", "cut", "drop"] = "auto"
    """Examples longer than that: cut their ends, end-of-turn token included, or leave them out.
    auto cuts, and refuses data of which more than a fifth would lose its end."""


class Preferred(Examples):
    """Pairs of responses, one preferred to the other."""

    columns: Annotated[list[str], Also("column")] = []
    """What the columns hold, where their names do not tell (repeatable): `prompt=q,chosen=a`.
    Roles: prompt, chosen, rejected, margin, system; responses, ranks."""

    truncation: Literal["auto", "cut", "drop"] = "auto"
    """Pairs longer than that: cut both prompts from the left, never a response, or leave them out.
    auto cuts, and refuses data of which more than a fifth has responses too long by themselves."""


class LowRank(Fields):
    """Train a few weights beside the model's own."""

    lora: Annotated[bool, Also("use-peft")] = False
    """Train low-rank adapters (Hu et al., 2021, arXiv:2106.09685)."""

    lora_r: Annotated[PositiveInt, Also("lora-rank")] = 16
    """Rank of the adapters."""

    lora_alpha: PositiveFloat | None = None
    """Scale of the adapters; by default twice the rank."""

    lora_dropout: OpenFraction = 0.0
    """Dropout before the adapters."""

    lora_targets: Annotated[
        list[str], BeforeValidator(split_names), Also("lora-target-modules", "lora-target")
    ] = []
    """Layers to adapt (repeatable): names as in the model, such as `q_proj,v_proj`; by default
    every linear layer but the output (`all-linear`)."""

    rslora: Annotated[bool, Also("use-rslora")] = False
    """Scale by the root of the rank (Kalajdzievski, 2023, arXiv:2312.03732)."""

    dora: Annotated[bool, Also("use-dora")] = False
    """Train magnitude apart from direction (Liu et al., 2024, arXiv:2402.09353); implies lora."""

    merge: Annotated[bool, Also("merge-adapter")] = False
    """Also write model/, with the adapter merged in."""

    @property
    def has_adapter(self) -> bool:
        """Whether the model's own weights stay frozen."""
        return self.is_low_rank

    @property
    def is_low_rank(self) -> bool:
        """Whether low-rank adapters are trained."""
        return self.lora or self.dora

    @model_validator(mode="after")
    def _check_low_rank(self) -> Self:
        if not self.is_low_rank:
            names = ("lora_r", "lora_alpha", "lora_dropout", "lora_targets", "rslora", "merge")
            self.refuse(names, "{} goes with --lora")
        return self


class Quantized(LowRank):
    """Low-rank adapters, on weights that may be kept small."""

    load_in_4bit: bool = False
    """Keep the frozen weights in 4 bits (NF4, double quantization; QLoRA, Dettmers et al., 2023,
    arXiv:2305.14314); needs lora."""

    load_in_8bit: bool = False
    """Keep the frozen weights in 8 bits; needs lora."""

    @property
    def is_quantized(self) -> bool:
        """Whether the frozen weights are kept in few bits."""
        return self.load_in_4bit or self.load_in_8bit

    @model_validator(mode="after")
    def _check_quantized(self) -> Self:
        self.at_most_one("load_in_4bit", "load_in_8bit")
        if self.is_quantized and not self.is_low_rank:
            flag = "--load-in-4bit" if self.load_in_4bit else "--load-in-8bit"
            raise ValueError(f"{flag} freezes the weights: add --lora to train beside them")
        return self


class Adapter(Quantized):
    """Other ways to train beside the model's weights."""

    prompt_tuning: Annotated[PositiveInt | None, Also("num-virtual-tokens")] = None
    """Train this many virtual tokens before every input instead (Lester et al., 2021,
    arXiv:2104.08691)."""

    @property
    def has_adapter(self) -> bool:
        """Whether the model's own weights stay frozen."""
        return self.is_low_rank or self.prompt_tuning is not None

    @model_validator(mode="after")
    def _check_adapter(self) -> Self:
        if self.is_low_rank and self.prompt_tuning is not None:
            raise ValueError("give --lora or --prompt-tuning, not both")
        return self


class Memory(Fields):
    """Save memory for time."""

    activation_checkpointing: Annotated[bool, Also("gradient-checkpointing")] = False
    """Compute activations again in the backward pass instead of keeping them."""


class Samples(Fields):
    """Texts that the model writes at evaluations."""

    samples: NonNegativeCount = 4
    """Validation prompts, or beginnings of its texts, to answer before the first step and at every
    evaluation, into samples.jsonl; 0 answers none."""

    sample_prompt: Annotated[list[str], Also("sample-prompts")] = []
    """Prompt to answer instead (repeatable)."""

    sample_tokens: Annotated[PositiveInt, Field(le=4096)] = 64
    """Most tokens of such an answer."""


class Tuning(LowRank, Length, Batch, Optimizer, Memory, Evaluation, Placement, Compiled, Resumable):
    """Fields of every command that fine-tunes."""

    group_by_length: bool = False
    """Put examples of like length into one step: less padding, less mixing."""

    optimizer: Annotated[
        Literal["auto", "adamw", "adamw-8bit", "paged-adamw-8bit"], Also("optim")
    ] = "auto"
    """Update rule. auto: AdamW; its paged 8-bit form for a quantized model on a GPU."""

    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay, on matrices only."""

    beta2: Annotated[OpenFraction, Also("adam-beta2")] = 0.999
    """AdamW's decay of the second moment."""

    min_lr: Annotated[Fraction, Also("min-lr-rate")] = 0.0
    """Learning rate at the end, as a share of the peak (wsd and linear and cosine)."""

    log_every: Annotated[PositiveInt | None, Also("logging-steps", "log-interval")] = None
    """Steps between lines of metrics; by default a hundredth of the run."""

    @model_validator(mode="after")
    def _check_tuning(self) -> Self:
        self.at_most_one("max_steps", "epochs")
        self.check_schedule()
        return self

"""Config of `ppo`."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from llmctl.config.base import Also, Fields, Input
from llmctl.config.finetuning import Quantized
from llmctl.config.sections import (
    Evaluation,
    Fraction,
    NonNegativeCount,
    OpenFraction,
    Optimizer,
    Placement,
    PositiveCount,
    Resumable,
    ScoreAt,
)
from llmctl.numbers import counted


class Prompts(Fields):
    """Prompts of training and validation."""

    data: Annotated[list[str], Also("dataset", "dataset-name", "prompts"), Input("data")] = []
    """Prompts (repeatable): jsonl, json, csv or parquet with `prompt`, `messages`, `instruction` or
    `question`, and the answer for rules beside it; a prompt per line of txt; `builtin:tasks`."""

    chat_template: Annotated[str | None, Also("chat-template-path", "template"), Input()] = None
    """Chat template: a jinja file, or a name such as chatml. By default the model's own."""

    plain: bool = False
    """Continue prompts as plain text, without a chat template."""

    val_size: NonNegativeCount | None = None
    """Prompts to hold out: those with the smallest hashes. By default a tenth, at most 64; 0 holds
    out none."""

    val_data: Annotated[list[str], Input("data")] = []
    """Prompts to hold out from elsewhere (repeatable)."""

    skip_bad_rows: NonNegativeCount = 0
    """Leave out up to this many rows that hold no prompt that fits, and count them."""


class Rewards(Fields):
    """Reward models and rules."""

    reward_model: Annotated[list[str], Also("reward-model-path"), Input("reward")] = []
    """Reward model (repeatable): a run, folder or Hub id; `runs/helpful=1.0` gives it a weight."""

    score_at: ScoreAt | None = None
    """Token that reward models are read at, as in `llmctl reward --score`; by default what the
    folder of each records, else the end of the turn."""

    reward_rule: Annotated[list[str], Also("reward-funcs", "reward-function"), Input()] = []
    """Rule that scores (repeatable, weights as above): `exact`, `regex:PATTERN`, `length:WORDS`,
    `repetition`, or `python:package.module.function`."""

    score_normalization: Literal["reference", "running", "none"] = "reference"
    """Bring the scores of each reward model to mean 0 and variance 1: those of the reference's own
    responses, measured once, or of all so far."""

    clip_score: NonNegativeFloat = 5.0
    """Hold the normalised score of each reward model within plus and minus this; 0 does not."""

    missing_eos_penalty: NonNegativeFloat | None = None
    """Take this from the score of a response that did not end by itself."""


class Rollouts(Fields):
    """Sampling of responses."""

    max_new_tokens: Annotated[PositiveInt, Also("response-length", "max-completion-length")] = 64
    """Most tokens of a response."""

    temperature: PositiveFloat = 1.0
    """Softmax temperature of the policy, in sampling and in its log-probabilities."""

    num_samples: Annotated[PositiveInt, Also("num-generations", "samples-per-prompt")] = 1
    """Responses for each prompt."""

    ignore_eos: bool = False
    """Do not end responses at EOS: each has `max_new_tokens`."""

    rollout_batch_size: Annotated[PositiveInt, Also("local-rollout-forward-batch-size")] = 64
    """Most sequences generated at once."""


class Algorithm(Fields):
    """Proximal policy optimisation (Schulman et al., 2017, arXiv:1707.06347)."""

    batch_size: Annotated[PositiveInt, Also("rollout-size", "episodes-per-step")] = 64
    """Episodes of a step on one device."""

    ppo_epochs: Annotated[PositiveInt, Also("num-ppo-epochs")] = 4
    """Passes over the episodes of a step."""

    minibatches: Annotated[PositiveInt, Also("num-mini-batches")] = 4
    """Updates of a pass."""

    pass_tokens: Annotated[PositiveCount | None, Also("micro-batch-tokens")] = None
    """Most tokens, padding included, of a forward and backward pass; by default chosen by model and
    device. It changes memory and speed only."""

    clip: Annotated[PositiveFloat, Also("cliprange", "clip-range")] = 0.2
    """Epsilon of the ratio."""

    value_clip: Annotated[NonNegativeFloat, Also("cliprange-value", "clip-range-vf")] = 0.2
    """Epsilon of the values; 0 does not clip them."""

    value_coef: Annotated[NonNegativeFloat, Also("vf-coef")] = 0.1
    """Weight of the value loss."""

    entropy_coef: NonNegativeFloat = 0.0
    """Weight of the entropy bonus."""

    gamma: Annotated[Fraction, Also("discount")] = 1.0
    """Discount per token."""

    lam: Annotated[Fraction, Also("gae-lambda")] = 0.95
    """Lambda of the advantages (Schulman et al., 2016, arXiv:1506.02438)."""

    whiten_advantages: bool = True
    """Bring the advantages of a step to mean 0 and variance 1."""

    kl_coef: Annotated[NonNegativeFloat, Also("init-kl-coef", "beta")] = 0.05
    """Penalty on the KL divergence from the reference, in score per nat."""

    kl_estimator: Literal["k1", "k3"] = "k1"
    """Estimator of the penalty."""

    kl_target: PositiveFloat | None = None
    """Adapt the penalty so that the KL of a response stays about this many nats."""

    kl_horizon: PositiveFloat = 10_000
    """Episodes over which it adapts."""

    stop_kl: Annotated[PositiveFloat | None, Also("target-kl")] = None
    """End the passes over a step's episodes once the policy is this many nats per token from the
    one that sampled them."""

    value_init: Literal["auto", "reward", "policy"] = "auto"
    """What the value model starts from. auto: the reward model where it is a decoder with the
    policy's tokenizer, else the policy."""

    value_lr: PositiveFloat | None = None
    """Peak learning rate of the value model; by default the policy's."""


class Episodes(Fields):
    """Length of training; one of the three."""

    max_steps: Annotated[PositiveCount | None, Also("num-iterations", "steps")] = None
    """Steps: batches of episodes."""

    episodes: Annotated[PositiveCount | None, Also("total-episodes")] = None
    """Episodes in all."""

    epochs: Annotated[PositiveFloat | None, Also("num-train-epochs")] = None
    """Passes over the prompts; by default 1."""


class PpoConfig(
    Prompts,
    Rewards,
    Rollouts,
    Algorithm,
    Episodes,
    Quantized,
    Optimizer,
    Evaluation,
    Placement,
    Resumable,
):
    """Align a model with rewards by proximal policy optimisation."""

    makes: ClassVar = ("model", "tokenizer")

    model: Annotated[str, Also("model-name-or-path", "sft-model-path", "policy"), Input("model")]
    """Model to align, which is also the reference: a run, folder or Hub id."""

    schedule: Annotated[
        Literal["cosine", "linear", "constant", "wsd"], Also("lr-scheduler-type", "lr-scheduler")
    ] = "linear"
    """Decay after warm-up; wsd holds the peak and decays linearly over the last `decay` share."""

    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay, on matrices only."""

    beta2: Annotated[OpenFraction, Also("adam-beta2")] = 0.999
    """AdamW's decay of the second moment."""

    min_lr: Annotated[Fraction, Also("min-lr-rate")] = 0.0
    """Learning rate at the end, as a share of the peak (wsd and linear and cosine)."""

    log_every: Annotated[PositiveInt, Also("logging-steps", "log-interval")] = 1
    """Steps between lines of metrics."""

    samples: Annotated[NonNegativeCount, Field(le=64)] = 4
    """Held-out prompts whose responses are shown before and after, into samples.jsonl."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = self.given()
        self.require_field("data", "prompts in jsonl or txt, or builtin:tasks")
        if not (self.reward_model or self.reward_rule):
            raise ValueError("--reward-model or --reward-rule is required: what is rewarded?")
        self.at_most_one(*Episodes.model_fields)
        if self.plain and self.chat_template:
            raise ValueError("give --plain or --chat-template, not both")
        self.at_most_one("val_size", "val_data")
        if self.lora_dropout:
            raise ValueError("--lora-dropout: the ratio of the policies would not be 1; drop it")
        if self.precision == "pure-bf16" and self.has_adapter:
            raise ValueError("--precision pure-bf16 does not go with adapters: use bf16")
        if self.batch_size < self.minibatches:
            raise ValueError(
                f"--minibatches {self.minibatches}: a step has "
                f"{counted(self.batch_size, 'episode')}"
            )
        if self.batch_size % self.num_samples:
            raise ValueError(
                f"--num-samples {self.num_samples} does not divide --batch-size {self.batch_size}"
            )
        if "kl_horizon" in given and self.kl_target is None:
            raise ValueError("--kl-horizon goes with --kl-target")
        if self.kl_target is not None and not self.kl_coef:
            raise ValueError("--kl-target adapts --kl-coef, which must be above 0")
        if self.missing_eos_penalty and self.ignore_eos:
            raise ValueError("--missing-eos-penalty does not go with --ignore-eos")
        if not self.reward_model:
            names = ("clip_score", "score_normalization", "score_at")
            self.refuse(names, "{} goes with --reward-model")
        if self.clip_score and "clip_score" in given and self.score_normalization == "none":
            raise ValueError("--clip-score goes with normalised scores")
        self.check_schedule()
        return self

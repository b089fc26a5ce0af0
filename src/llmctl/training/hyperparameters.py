"""Every number that decides a training run, resolved from flags, data, model and machine."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from llmctl import hardware
from llmctl.config.commands.dpo import DpoConfig
from llmctl.config.commands.ppo import PpoConfig
from llmctl.config.commands.pretrain import PretrainConfig
from llmctl.config.commands.reward import RewardConfig
from llmctl.config.commands.sft import SftConfig
from llmctl.config.finetuning import Adapter, Tuning
from llmctl.config.sections import Placement
from llmctl.errors import ResourceError, UserError
from llmctl.numbers import counted

COMPUTE_OPTIMAL = 20  # tokens per parameter (Hoffmann et al., 2022, arXiv:2203.15556)
PRETRAIN_EPOCHS = 10  # more repetition teaches little (Muennighoff et al., 2023, arXiv:2305.16264)
GPU_BATCH_TOKENS = 524_288  # of a GPT-2 124M step; scaled by the root of the size
CPU_BATCH_TOKENS = 2_048  # small models learn more from more steps than from larger ones
BF16_PARAMETERS = 4_000_000  # autocast costs more than it gains in smaller models on a CPU
EPOCHS = 3
"""Passes over the rows of sft."""
PAIR_EPOCHS = 1
"""Passes over pairs: more make a model learn them by heart (Ouyang et al., 2022, appendix C.2)."""
BATCH_SIZE = 8
SIZE_OF_LR, LR_OF_SIZE = 7e9, 2e-5
"""Common for full fine-tuning of 7B; smaller models take more, by the root of the size."""
ADAPTER_LR = 10
"""Adapters take ten times the rate (Schulman et al., 2025, LoRA Without Regret)."""
HIGHEST_LR = 2e-3
LR_SHARE = {"sft": 1.0, "reward": 1.0, "dpo": 0.1, "ppo": 0.05}
"""Shares of fine-tuning's rate: at all of it a few steps of dpo leave the reference far behind, and
a policy that samples its own data breaks."""

Method = Literal["pretrain", "sft", "reward", "dpo", "ppo"]


@dataclass(frozen=True)
class PpoHyperparameters:
    """Hyperparameters that only PPO has."""

    minibatches: int
    ppo_epochs: int
    pass_tokens: int
    value_lr: float


@dataclass(frozen=True)
class EvaluationShare:
    """What evaluation takes of a run, as planned."""

    evaluations: int
    """Times that the run evaluates, after the last step included."""
    evaluation_tokens: int
    """Forward tokens of all of them."""
    training_tokens: int
    """Forward tokens of all steps, of which a trained token is three."""
    evaluation_share: float
    """Share of evaluation in both together."""


@dataclass(frozen=True)
class Hyperparameters:
    """Everything numeric that decides a run; a resumed run must have the same.

    `batch_size` counts sequences, texts, pairs or episodes of a micro-batch on one process.
    """

    max_steps: int
    batch_size: int
    grad_accum: int
    world_size: int
    optimizer: str
    lr: float
    schedule: str
    warmup_steps: int
    decay_steps: int
    min_lr: float
    weight_decay: float
    beta1: float
    beta2: float
    max_grad_norm: float
    precision: str
    seed: int
    eval_every: int
    save_every: int
    log_every: int
    early_stop: int | None
    context: int | None = None
    """Tokens of a pretraining sequence."""
    momentum: float | None = None
    """Muon's."""
    eval_tokens: int | None = None
    """Validation tokens that an evaluation of pretraining reads; 0 for all."""
    eval_rows: int | None = None
    """Validation rows that an evaluation of other training reads, where it does not read all."""
    evaluation: EvaluationShare | None = None
    ppo: PpoHyperparameters | None = None

    @property
    def rows_per_step(self) -> int:
        """Sequences, texts or pairs that make one optimizer step, over all processes."""
        return self.batch_size * self.grad_accum * self.world_size

    @property
    def tokens_per_step(self) -> int:
        """Tokens that make one optimizer step of pretraining, over all processes."""
        assert self.context is not None
        return self.rows_per_step * self.context

    def identity(self) -> dict[str, Any]:
        """Return what decides the weights, by flag; how often to look at them or save does not."""
        looks = ("eval_every", "eval_tokens", "eval_rows", "evaluation", "early_stop")
        free = (*looks, "save_every", "log_every", "ppo")
        return {
            name.removesuffix("_steps") if name in ("warmup_steps", "decay_steps") else name: value
            for name, value in asdict(self).items()
            if name not in free and value is not None
        }

    def as_json(self) -> dict[str, Any]:
        """Return all that applies, for the manifest."""
        groups = [part for part in (self.evaluation, self.ppo) if part is not None]
        own = {k: v for k, v in asdict(self).items() if k not in ("evaluation", "ppo")}
        return own | {name: value for part in groups for name, value in asdict(part).items()}

    def lr_at(self, step: int) -> float:
        """Learning rate of step number `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.lr
        start = self.warmup_steps
        if self.schedule == "wsd":
            start = max(start, self.max_steps - self.decay_steps)
        done = min(1.0, max(0.0, (step - start) / max(1, self.max_steps - start)))
        shape = (1 + math.cos(math.pi * done)) / 2 if self.schedule == "cosine" else 1 - done
        return self.lr * (self.min_lr + (1 - self.min_lr) * shape)


def fill_in(
    config: PretrainConfig | Tuning | PpoConfig,
    *,
    max_steps: int,
    batch_size: int,
    grad_accum: int,
    world_size: int,
    optimizer: str,
    lr: float,
    parameters: int,
    device: str,
) -> Hyperparameters:
    """Fill in what the user left open and every method decides alike.

    `lr` is the peak learning rate where the user gave none; `parameters` are those of the whole
    model.

    Raises:
        ResourceError: a precision that does not run here.
    """
    tenth = max(1, max_steps // 10)
    return Hyperparameters(
        max_steps=max_steps,
        batch_size=batch_size,
        grad_accum=grad_accum,
        world_size=world_size,
        optimizer=optimizer,
        lr=config.lr or lr,
        schedule=config.schedule,
        warmup_steps=int(config.warmup if config.warmup >= 1 else round(config.warmup * max_steps)),
        decay_steps=round(config.decay * max_steps),
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        beta1=config.beta1,
        beta2=config.beta2,
        max_grad_norm=config.max_grad_norm,
        precision=choose_precision(config, parameters, device),
        seed=config.seed,
        eval_every=config.eval_every or tenth,
        save_every=config.save_every or tenth,
        log_every=config.log_every or min(100, max(1, max_steps // 100)),
        early_stop=config.early_stop,
    )


def for_pretraining(
    config: PretrainConfig,
    *,
    parameters: int,
    train_tokens: int,
    context: int,
    world_size: int,
    device: str,
    sharded: bool,
) -> Hyperparameters:
    """Fill in what the user left open of pretraining.

    Raises:
        UserError: a batch that does not divide, or an optimizer that does not run here.
        ResourceError: an optimizer or a precision that does not run here.
    """
    batch_size, grad_accum = _pretrain_batch(config, parameters, context, world_size, device)
    per_step = batch_size * grad_accum * world_size * context
    if config.optimizer == "muon" and sharded:
        raise UserError("--optimizer muon does not run under FSDP", hint="use --optimizer adamw")
    optimizer = _optimizer(config, "adamw" if config.model or sharded else "muon", device)
    if "momentum" in config.given() and optimizer != "muon":
        raise UserError(f"--momentum is Muon's, and this run uses {optimizer}")
    filled = fill_in(
        config,
        max_steps=_pretrain_steps(config, parameters, train_tokens, per_step),
        batch_size=batch_size,
        grad_accum=grad_accum,
        world_size=world_size,
        optimizer=optimizer,
        lr=default_lr(
            parameters, "pretrain", optimizer=optimizer, continued=config.model is not None
        ),
        parameters=parameters,
        device=device,
    )
    return replace(filled, context=context, momentum=config.momentum)


def for_finetuning(
    config: Tuning,
    *,
    parameters: int,
    rows: int,
    world_size: int,
    device: str,
) -> Hyperparameters:
    """Fill in what the user left open of sft, reward or dpo.

    `rows` are training sequences, packed ones counted once; texts or pairs.

    Raises:
        ResourceError: an optimizer or a precision that does not run here.
    """
    method = method_of(config)
    batch_size, grad_accum = config.batch_size or BATCH_SIZE, config.grad_accum or 1
    per_step = batch_size * grad_accum * world_size
    epochs = config.epochs or (EPOCHS if method == "sft" else PAIR_EPOCHS)
    is_paged = isinstance(config, Adapter) and config.is_quantized and device == "cuda"
    return fill_in(
        config,
        max_steps=config.max_steps or max(1, round(epochs * rows / per_step)),
        batch_size=batch_size,
        grad_accum=grad_accum,
        world_size=world_size,
        optimizer=_optimizer(config, "paged-adamw-8bit" if is_paged else "adamw", device),
        lr=default_lr(parameters, method, has_adapter=config.has_adapter),
        parameters=parameters,
        device=device,
    )


def method_of(config: Tuning) -> Method:
    """Name of the command whose fields these are."""
    methods: dict[type[Tuning], Method] = {
        SftConfig: "sft",
        RewardConfig: "reward",
        DpoConfig: "dpo",
    }
    return methods[type(config)]


def default_lr(
    parameters: int,
    method: Method,
    *,
    optimizer: str = "adamw",
    continued: bool = False,
    has_adapter: bool = False,
) -> float:
    """Peak learning rate that suits a method and a size.

    Pretraining takes GPT-2 124M's 6e-4, scaled by N^(-1/4); Muon stands twice as much, and a model
    that has been trained already a tenth. Everything else takes a share of fine-tuning's rate.
    """
    if method == "pretrain":
        lr = 6e-4 * (124e6 / parameters) ** 0.25
        lr *= 2 if optimizer == "muon" else 1
        lr /= 10 if continued else 1
        return float(f"{min(lr, 5e-3):.2g}")
    factor = ADAPTER_LR if has_adapter else 1
    lr = LR_OF_SIZE * (SIZE_OF_LR / max(1, parameters)) ** 0.5 * factor
    rounded = float(f"{min(lr, HIGHEST_LR * (2 if has_adapter else 1)):.2g}")
    return rounded if LR_SHARE[method] == 1 else float(f"{LR_SHARE[method] * rounded:.2g}")


def choose_precision(config: Placement, parameters: int, device: str) -> str:
    """fp32, bf16 or pure-bf16: as asked, or what pays; raise a ResourceError without bfloat16."""
    if config.precision == "auto":
        gains = device == "cuda" or parameters >= BF16_PARAMETERS
        return "bf16" if gains and hardware.has_bf16(device) else "fp32"
    if config.precision != "fp32" and device == "cuda" and not hardware.has_bf16(device):
        raise ResourceError(
            f"--precision {config.precision}: this GPU has no bfloat16",
            hint="use --precision fp32",
        )
    return config.precision


def preset_for(train_tokens: int, device: str) -> str:
    """Preset that a corpus of this size can fill and this device can train."""
    for limit, name in ((3e6, "nano"), (3e7, "tiny"), (2e8, "mini"), (4e9, "small")):
        if train_tokens < limit or (device == "cpu" and name == "tiny"):
            return name
    return "medium"


def _pretrain_batch(
    config: PretrainConfig, parameters: int, context: int, world_size: int, device: str
) -> tuple[int, int]:
    if config.batch_size is not None:
        batch_size = config.batch_size
    elif device == "cpu":
        batch_size = max(1, CPU_BATCH_TOKENS // context)
    else:
        batch_size = max(1, 16_384 // context)
    per_pass = batch_size * context * world_size
    if config.batch_tokens is not None:
        grad_accum, rest = divmod(config.batch_tokens, per_pass)
        if rest or not grad_accum:
            raise UserError(
                f"--batch-tokens {config.batch_tokens:,} is not a multiple of the {per_pass:,} "
                f"tokens of one pass (batch size {batch_size} x context {context} x "
                f"{counted(world_size, 'process', 'processes')})",
                hint=f"try --batch-tokens {per_pass * max(1, config.batch_tokens // per_pass)}",
            )
        return batch_size, grad_accum
    if config.grad_accum is not None or device == "cpu":
        return batch_size, config.grad_accum or 1
    wanted = 2 ** round(math.log2(max(per_pass, GPU_BATCH_TOKENS * math.sqrt(parameters / 124e6))))
    return batch_size, max(1, wanted // per_pass)


def _pretrain_steps(
    config: PretrainConfig, parameters: int, train_tokens: int, per_step: int
) -> int:
    if config.max_steps is not None:
        return config.max_steps
    if config.epochs is not None:
        tokens = config.epochs * train_tokens
    elif config.tokens_budget is not None:
        tokens = config.tokens_budget
    elif config.tokens_per_parameter is not None:
        tokens = config.tokens_per_parameter * parameters
    else:
        tokens = min(COMPUTE_OPTIMAL * parameters, PRETRAIN_EPOCHS * train_tokens)
    return max(1, round(tokens / per_step))


def _optimizer(config: PretrainConfig | Tuning, auto: str, device: str) -> str:
    """The optimizer, `auto` unless one was chosen; raise a ResourceError if it needs a GPU."""
    if config.optimizer == "auto":
        return auto
    if config.optimizer.endswith("8bit") and device != "cuda":
        raise ResourceError(
            f"--optimizer {config.optimizer} needs a GPU", hint="use --optimizer adamw"
        )
    return config.optimizer

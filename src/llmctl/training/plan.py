"""Every number that decides a training run, resolved from flags, corpus, model and machine."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from llmctl import hardware
from llmctl.config.sections import Placement
from llmctl.config.stages import PretrainConfig
from llmctl.errors import ResourceError, UserError
from llmctl.training.schedule import lr_at, warmup_steps

COMPUTE_OPTIMAL = 20  # tokens per parameter (Hoffmann et al., 2022, arXiv:2203.15556)
EPOCHS = 10  # more repetition teaches little (Muennighoff et al., 2023, arXiv:2305.16264)
GPU_BATCH_TOKENS = 524_288  # of a GPT-2 124M step; scaled by the root of the size
CPU_BATCH_TOKENS = 2_048  # small models learn more from more steps than from larger ones
BF16_PARAMETERS = 4_000_000  # autocast costs more than it gains in smaller models on a CPU


@dataclass(frozen=True)
class Plan:
    """What a run does; a run that resumes must have the same."""

    max_steps: int
    batch_size: int
    grad_accum: int
    world_size: int
    context: int
    optimizer: str
    lr: float
    schedule: str
    warmup_steps: int
    decay_steps: int
    min_lr: float
    weight_decay: float
    beta1: float
    beta2: float
    momentum: float
    max_grad_norm: float
    precision: str
    seed: int
    eval_every: int
    eval_tokens: int
    save_every: int
    early_stop: int | None

    @property
    def sequences_per_step(self) -> int:
        """Sequences that make one optimizer step, over all processes."""
        return self.batch_size * self.grad_accum * self.world_size

    @property
    def tokens_per_step(self) -> int:
        """Tokens that make one optimizer step, over all processes."""
        return self.sequences_per_step * self.context

    def identity(self) -> dict[str, Any]:
        """What decides the weights, by flag; how often to look at them or save them does not."""
        free = ("eval_every", "eval_tokens", "save_every", "early_stop")
        return {
            name.removesuffix("_steps") if name in ("warmup_steps", "decay_steps") else name: value
            for name, value in asdict(self).items()
            if name not in free
        }

    def lr_at(self, step: int) -> float:
        """Learning rate of step number `step`, counted from 0."""
        return lr_at(self, step)


def preset_for(train_tokens: int, device: str) -> str:
    """The preset that a corpus of this size can fill and this device can train."""
    for limit, name in ((3e6, "nano"), (3e7, "tiny"), (2e8, "mini"), (4e9, "small")):
        if train_tokens < limit or (device == "cpu" and name == "tiny"):
            return name
    return "medium"


def make_plan(
    config: PretrainConfig,
    *,
    parameters: int,
    train_tokens: int,
    context: int,
    world_size: int,
    device: str,
    sharded: bool,
) -> Plan:
    """Fill in what the user left open.

    Raises:
        UserError: a batch that does not divide, or an optimizer that does not run here.
    """
    batch_size, grad_accum = _batch(config, parameters, context, world_size, device)
    per_step = batch_size * grad_accum * world_size * context
    max_steps = _max_steps(config, parameters, train_tokens, per_step)
    optimizer = _optimizer(config, device, sharded)
    if "momentum" in config.given() and optimizer != "muon":
        raise UserError(f"--momentum is Muon's, and this run uses {optimizer}")
    tenth = max(1, max_steps // 10)
    return Plan(
        max_steps=max_steps,
        batch_size=batch_size,
        grad_accum=grad_accum,
        world_size=world_size,
        context=context,
        optimizer=optimizer,
        lr=config.lr or default_lr(parameters, optimizer, continued=config.model is not None),
        schedule=config.schedule,
        warmup_steps=warmup_steps(config, max_steps),
        decay_steps=round(config.decay * max_steps),
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        beta1=config.beta1,
        beta2=config.beta2,
        momentum=config.momentum,
        max_grad_norm=config.max_grad_norm,
        precision=choose_precision(config, parameters, device),
        seed=config.seed,
        eval_every=config.eval_every or tenth,
        eval_tokens=config.eval_tokens,
        save_every=config.save_every or tenth,
        early_stop=config.early_stop,
    )


def default_lr(parameters: int, optimizer: str, *, continued: bool) -> float:
    """A peak learning rate that suits the size: GPT-2 124M's 6e-4, scaled by N^(-1/4).

    Muon stands twice as much; a model that has been trained already, a tenth.
    """
    lr = 6e-4 * (124e6 / parameters) ** 0.25
    if optimizer == "muon":
        lr *= 2
    if continued:
        lr /= 10
    return float(f"{min(lr, 5e-3):.2g}")


def _batch(
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
                f"{world_size} processes)",
                hint=f"try --batch-tokens {per_pass * max(1, config.batch_tokens // per_pass)}",
            )
        return batch_size, grad_accum
    if config.grad_accum is not None or device == "cpu":
        return batch_size, config.grad_accum or 1
    wanted = 2 ** round(math.log2(max(per_pass, GPU_BATCH_TOKENS * math.sqrt(parameters / 124e6))))
    return batch_size, max(1, wanted // per_pass)


def _max_steps(config: PretrainConfig, parameters: int, train_tokens: int, per_step: int) -> int:
    if config.max_steps is not None:
        return config.max_steps
    if config.epochs is not None:
        tokens = config.epochs * train_tokens
    elif config.tokens_budget is not None:
        tokens = config.tokens_budget
    elif config.tokens_per_parameter is not None:
        tokens = config.tokens_per_parameter * parameters
    else:
        tokens = min(COMPUTE_OPTIMAL * parameters, EPOCHS * train_tokens)
    return max(1, round(tokens / per_step))


def _optimizer(config: PretrainConfig, device: str, sharded: bool) -> str:
    chosen = config.optimizer
    if chosen == "auto":
        return "adamw" if config.model or sharded else "muon"
    if chosen == "muon" and sharded:
        raise UserError("--optimizer muon does not run under FSDP", hint="use --optimizer adamw")
    if chosen == "adamw-8bit" and device != "cuda":
        raise ResourceError("--optimizer adamw-8bit needs a GPU", hint="use --optimizer adamw")
    return chosen


def choose_precision(config: Placement, parameters: int, device: str) -> str:
    """fp32, bf16 or pure-bf16: what was asked for, or what pays.

    Raises:
        ResourceError: this GPU has no bfloat16.
    """
    if config.precision == "auto":
        gains = device == "cuda" or parameters >= BF16_PARAMETERS
        return "bf16" if gains and hardware.has_bf16(device) else "fp32"
    if config.precision != "fp32" and device == "cuda" and not hardware.has_bf16(device):
        raise ResourceError(
            f"--precision {config.precision}: this GPU has no bfloat16",
            hint="use --precision fp32",
        )
    return config.precision

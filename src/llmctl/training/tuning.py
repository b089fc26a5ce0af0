"""Every number that decides a fine-tuning run, resolved from flags, data, model and machine."""

from dataclasses import asdict, dataclass
from typing import Any

from llmctl.config.supervised import Adapter
from llmctl.config.tuning import Tuning
from llmctl.errors import ResourceError
from llmctl.training.job import Rhythm
from llmctl.training.plan import choose_precision
from llmctl.training.schedule import warmup_steps

EPOCHS = 3
BATCH = 8
LARGE = 7e9
LARGE_LR = 2e-5
"""What is common for models of 7B in full; smaller ones take more, by the root of the size."""
LOW_RANK = 10
"""Adapters take ten times the rate (Schulman et al., 2025, LoRA Without Regret)."""
HIGHEST_LR = 2e-3


@dataclass(frozen=True)
class TuningPlan:
    """What a run does; a run that resumes must have the same."""

    max_steps: int
    batch_size: int
    grad_accum: int
    optimizer: str
    lr: float
    schedule: str
    warmup_steps: int
    decay_steps: int
    min_lr: float
    precision: str
    eval_every: int
    save_every: int
    log_every: int

    def identity(self) -> dict[str, Any]:
        """What decides the weights and Trainer's arguments do not say, by flag."""
        names = ("lr", "schedule", "min_lr", "precision", "optimizer")
        found: dict[str, Any] = {name: getattr(self, name) for name in names}
        return {
            **found,
            "max_steps": self.max_steps,
            "warmup": self.warmup_steps,
            "decay": self.decay_steps,
        }

    def facts(self) -> dict[str, Any]:
        """For the manifest."""
        return asdict(self)


def make_tuning_plan(
    config: Tuning,
    *,
    parameters: int,
    rows: int,
    world: int,
    device: str,
    epochs: int = EPOCHS,
    lr_share: float = 1.0,
) -> TuningPlan:
    """Fill in what the user left open.

    Args:
        config: the command's fields.
        parameters: of the whole model.
        rows: training sequences, packed ones counted once.
        world: number of processes.
        device: type of device.
        epochs: passes over the rows, where the user left them open.
        lr_share: of fine-tuning's learning rate, where the user left it open.

    Raises:
        ResourceError: an optimizer or a precision that does not run here.
    """
    batch_size = config.batch_size or BATCH
    grad_accum = config.grad_accum or 1
    per_step = batch_size * grad_accum * world
    steps = config.max_steps or max(1, round((config.epochs or epochs) * rows / per_step))
    tenth = max(1, steps // 10)
    return TuningPlan(
        max_steps=steps,
        batch_size=batch_size,
        grad_accum=grad_accum,
        optimizer=_optimizer(config, device),
        lr=config.lr or lr_share * default_lr(parameters, has_adapter=config.has_adapter),
        schedule=config.schedule,
        warmup_steps=warmup_steps(config, steps),
        decay_steps=round(config.decay * steps) if config.schedule == "wsd" else 0,
        min_lr=config.min_lr,
        precision=choose_precision(config, parameters, device),
        eval_every=config.eval_every or tenth,
        save_every=config.save_every or tenth,
        log_every=config.log_every or min(100, max(1, steps // 100)),
    )


def rhythm_of(config: Tuning, plan: TuningPlan) -> Rhythm:
    """How often a run logs, evaluates and saves."""
    return Rhythm(
        max_steps=plan.max_steps,
        log_every=plan.log_every,
        eval_every=plan.eval_every,
        save_every=plan.save_every,
        keep=config.keep,
        early_stop=config.early_stop,
        on_nan=config.on_nan,
        max_nan_skips=config.max_nan_skips,
    )


def default_lr(parameters: int, *, has_adapter: bool) -> float:
    """A peak learning rate that suits the size."""
    lr = LARGE_LR * (LARGE / max(1, parameters)) ** 0.5 * (LOW_RANK if has_adapter else 1)
    return float(f"{min(lr, HIGHEST_LR * (2 if has_adapter else 1)):.2g}")


def _optimizer(config: Tuning, device: str) -> str:
    chosen = config.optimizer
    if chosen == "auto":
        quantized = isinstance(config, Adapter) and config.is_quantized
        return "paged-adamw-8bit" if quantized and device == "cuda" else "adamw"
    if chosen != "adamw" and device != "cuda":
        raise ResourceError(f"--optimizer {chosen} needs a GPU", hint="use --optimizer adamw")
    return chosen

"""Between Trainer's arguments and ours: what is off, what a run is, where its rate stands."""

from typing import Any

from peft import PeftModel
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from llmctl.errors import UserError
from llmctl.training.state import architecture

SWITCHED_OFF = {
    "save_strategy": SaveStrategy.NO,
    "eval_strategy": IntervalStrategy.NO,
    "logging_strategy": IntervalStrategy.NO,
    "logging_nan_inf_filter": False,
    "auto_find_batch_size": False,
    "enable_jit_checkpoint": False,
    "load_best_model_at_end": False,
    "push_to_hub": False,
    "report_to": [],
    "disable_tqdm": True,
}
"""Arguments of Trainer whose work `guard.py` does."""


def take_over(arguments: Any, max_steps: int) -> None:
    """Switch off what `guard.py` does, and set the length of the run.

    Raises:
        UserError: a schedule that is no function of the step.
    """
    if arguments.lr_scheduler_type.value in ("reduce_lr_on_plateau", "greedy"):
        raise UserError("a schedule that follows the loss cannot be resumed exactly")
    for name, value in SWITCHED_OFF.items():
        setattr(arguments, name, value)
    arguments.max_steps = max_steps


def identity_of(trainer: Trainer) -> dict[str, Any]:
    """What the trainer's arguments and its model decide, by the names of llmctl's flags."""
    args, model = trainer.args, trainer.model
    adapters = model.peft_config.values() if isinstance(model, PeftModel) else ()
    return {
        "max_steps": args.max_steps,
        "batch_size": args.per_device_train_batch_size,
        "grad_accum": args.gradient_accumulation_steps,
        "world_size": trainer.accelerator.num_processes,
        "optimizer": args.optim.value,
        "lr": args.learning_rate,
        "schedule": args.lr_scheduler_type.value,
        "warmup": args.warmup_steps,
        "weight_decay": args.weight_decay,
        "beta1": args.adam_beta1,
        "beta2": args.adam_beta2,
        "max_grad_norm": args.max_grad_norm,
        "seed": args.seed,
        "precision": "bf16" if args.bf16 else "fp32",
        "architecture": architecture(model.config),
        "adapter": [_plain(adapter.to_dict()) for adapter in adapters],
    }


def _plain(facts: dict[str, Any]) -> dict[str, Any]:
    """A PEFT configuration as JSON, without where its base model lies."""
    kept = {k: v for k, v in facts.items() if k not in ("base_model_name_or_path", "revision")}
    return {k: sorted(v) if isinstance(v, set) else str(v) for k, v in kept.items()}


def continue_schedule(scheduler: LambdaLR, saved: dict[str, Any]) -> None:
    """Go on at the saved step, with this run's peak and length: the rate is a function of the step.

    A scheduler's own `load_state_dict` brings back the old peak, and leaves the optimizer's rate.
    """
    scheduler.load_state_dict({**saved, "base_lrs": scheduler.base_lrs})
    factors = [rate(scheduler.last_epoch) for rate in scheduler.lr_lambdas]
    lrs = [base * factor for base, factor in zip(scheduler.base_lrs, factors, strict=True)]
    scheduler._last_lr = lrs
    for group, lr in zip(scheduler.optimizer.param_groups, lrs, strict=True):
        group["lr"] = lr

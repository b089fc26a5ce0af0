"""Between Trainer's arguments and ours: what is off, what a run is, where its rate stands."""

from enum import Enum
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

UNKEPT_OPTIMIZERS = ("schedule_free", "galore", "apollo", "lomo", "adalomo")
"""How the names begin of those with state outside of `state`, or that update while gradients are
computed, before the check of the numbers."""

WITHOUT_EFFECT = (
    *("output_dir", "run_name", "project", "use_cpu", "debug", "skip_memory_metrics"),
    *("do_train", "do_eval", "do_predict", "disable_tqdm", "report_to", "trust_remote_code"),
    *("activation_checkpointing", "gradient_checkpointing", "activation_offloading"),
    *("torch_empty_cache_steps", "use_cache", "local_rank", "ddp_timeout"),
    "ddp_find_unused_parameters",
    # the length is max_steps, the order Order's
    *("num_train_epochs", "data_seed", "train_sampling_strategy", "length_column_name"),
    *("ignore_data_skip", "resume_from_checkpoint", "restore_callback_states_from_checkpoint"),
    *("auto_find_batch_size", "dataloader_drop_last", "dataloader_num_workers"),
    *("dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor"),
    *("dataloader_multiprocessing_context", "dataloader_in_order"),
    # logging
    *("logging_strategy", "logging_steps", "logging_first_step", "log_level"),
    *("log_level_replica", "log_on_each_node", "logging_nan_inf_filter"),
    *("include_num_input_tokens_seen", "trackio_space_id"),
    *("trackio_bucket_id", "trackio_static_space_id"),
    # evaluation
    *("eval_strategy", "eval_steps", "eval_delay", "per_device_eval_batch_size", "eval_packing"),
    *("prediction_loss_only", "eval_on_start", "eval_do_concat_batches", "eval_use_gather_object"),
    *("eval_accumulation_steps", "include_for_metrics", "batch_eval_metrics", "bf16_full_eval"),
    *("fp16_full_eval", "metric_for_best_model", "greater_is_better", "load_best_model_at_end"),
    # saving and the Hub
    *("save_only_model", "save_strategy", "save_steps", "save_on_each_node", "save_total_limit"),
    *("enable_jit_checkpoint", "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id"),
    *("hub_strategy", "hub_always_push", "hub_revision"),
)
"""Arguments that decide nothing of the weights, here at least."""

FLAGS = {
    "learning_rate": "lr",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "grad_accum",
    "lr_scheduler_type": "schedule",
    "warmup_steps": "warmup",
    "adam_beta1": "beta1",
    "adam_beta2": "beta2",
    "optim": "optimizer",
    "bf16": "precision",
}
"""Arguments that llmctl has a flag for by another name."""

SPECIAL_TOKENS = ("eos_token", "pad_token")
"""What `to_dict` takes for secrets, and leaves out."""

SECRETS = ("token", "use_auth_token")
"""Keys within arguments that are mappings, whose values no file may hold."""


def take_over(arguments: Any, max_steps: int) -> None:
    """Switch off what `guard.py` does, and set the length of the run.

    Raises:
        UserError: something that cannot be resumed exactly.
    """
    _require_resumable(arguments)
    for name, value in SWITCHED_OFF.items():
        setattr(arguments, name, value)
    # else DDP sorts its buckets anew after the first step of a process, and sums in another order
    arguments.ddp_find_unused_parameters = None if arguments.fsdp else True
    arguments.max_steps = max_steps
    arguments._n_gpu = min(1, arguments.n_gpu)  # more in one process would be nn.DataParallel


def _require_resumable(arguments: Any) -> None:
    optimizer = arguments.optim.value
    recomputing = (
        arguments.activation_checkpointing_kwargs,
        arguments.gradient_checkpointing_kwargs,
    )
    refused = {
        "a schedule that follows the loss": arguments.lr_scheduler_type.value
        in ("reduce_lr_on_plateau", "greedy"),
        f"the optimizer {optimizer}": optimizer.startswith(UNKEPT_OPTIMIZERS),
        "fp16=True, whose scale is in no checkpoint,": arguments.fp16,
        "ignore_data_skip=True": arguments.ignore_data_skip,
        "sync_ref_model=True, whose model is in no checkpoint,": getattr(
            arguments, "sync_ref_model", False
        ),
        "use_reentrant=True": any((kwargs or {}).get("use_reentrant") for kwargs in recomputing),
    }
    for what, found in refused.items():
        if found:
            raise UserError(f"{what} cannot be resumed exactly")


def identity_of(trainer: Trainer) -> dict[str, Any]:
    """What the trainer's arguments and its model decide, by the names of llmctl's flags."""
    args, model = trainer.args, trainer.model
    decisive = {k: v for k, v in args.to_dict().items() if k not in WITHOUT_EFFECT}
    decisive |= {k: getattr(args, k) for k in SPECIAL_TOKENS if k in decisive}
    decisive["bf16"] = "bf16" if args.bf16 else "fp32"
    adapters = model.peft_config.values() if isinstance(model, PeftModel) else ()
    return {
        **{FLAGS.get(name, name): _plain(value) for name, value in decisive.items()},
        "world_size": trainer.accelerator.num_processes,
        "architecture": architecture(model.config),
        "adapter": [_adapter(adapter.to_dict()) for adapter in adapters],
    }


def _adapter(facts: dict[str, Any]) -> Any:
    """A PEFT configuration as JSON, without where its base model lies."""
    elsewhere = ("base_model_name_or_path", "revision")
    return _plain({k: v for k, v in facts.items() if k not in elsewhere})


def _plain(value: Any) -> Any:
    """A value as JSON, the same in every process."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items() if k not in SECRETS}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, set):
        return sorted(map(str, value))
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return getattr(value, "__qualname__", None) or str(value)


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

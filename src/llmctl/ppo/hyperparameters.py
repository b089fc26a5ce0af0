"""Hyperparameters of PPO: fields, prompts, model and machine in, every number out."""

from dataclasses import replace
from typing import Any

from llmctl.config.commands.ppo import PpoConfig
from llmctl.training.hyperparameters import (
    Hyperparameters,
    PpoHyperparameters,
    default_lr,
    fill_in,
)

CPU_PASS_TOKENS, GPU_PASS_TOKENS = 4096, 16_384
CPU_PASS_LOGITS, GPU_PASS_LOGITS = 1 << 26, 1 << 29
"""Logits of a forward and backward pass at most: 256 MB and 2 GB in float32."""
IRRELEVANT = (
    *("stage", "threads", "processes", "device", "keep", "save_every", "eval_every", "log_every"),
    *("early_stop", "samples", "merge", "on_nan", "max_nan_skips", "skip_bad_rows"),
    *("model", "data", "val_data", "reward_model", "score_at"),  # by their content instead
    *("episodes", "epochs"),  # by max_steps
)
"""Fields that do not change the weights, or that the identity holds in another form."""


def for_ppo(
    config: PpoConfig, *, parameters: int, prompts: int, world_size: int, device: str
) -> Hyperparameters:
    """Fill in what the user left open; raise a ResourceError for a precision that cannot run."""
    per_step = config.batch_size * world_size
    episodes = config.episodes or (config.epochs or 1) * prompts * config.num_samples
    filled = fill_in(
        config,
        max_steps=config.max_steps or max(1, round(episodes / per_step)),
        batch_size=config.batch_size,
        grad_accum=1,
        world_size=world_size,
        optimizer="adamw",
        lr=default_lr(parameters, "ppo", has_adapter=config.has_adapter),
        parameters=parameters,
        device=device,
    )
    pass_tokens = GPU_PASS_TOKENS if device == "cuda" else CPU_PASS_TOKENS
    ppo = PpoHyperparameters(
        minibatches=config.minibatches,
        ppo_epochs=config.ppo_epochs,
        pass_tokens=config.pass_tokens or pass_tokens,
        value_lr=config.value_lr or filled.lr,
    )
    return replace(filled, ppo=ppo)


def ppo_identity(config: PpoConfig, values: Hyperparameters) -> dict[str, Any]:
    """Everything that decides the weights, by flag: a run that resumes must have the same."""
    assert values.ppo is not None
    fields = {k: v for k, v in config.recipe("ppo").items() if k not in IRRELEVANT}
    resolved = ("max_steps", "lr", "precision")
    return {
        **fields,
        **{name: getattr(values, name) for name in resolved},
        "value_lr": values.ppo.value_lr,
        "pass_tokens": values.ppo.pass_tokens,
        "warmup": values.warmup_steps,
        "decay": values.decay_steps if values.schedule == "wsd" else 0,
        "grad_accum": 1,
    }

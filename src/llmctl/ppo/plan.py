"""Every number that decides a PPO run, resolved from flags, prompts, model and machine."""

from dataclasses import dataclass
from typing import Any

from llmctl.config.stages import PpoConfig
from llmctl.training.plan import choose_precision
from llmctl.training.schedule import warmup_steps
from llmctl.training.tuning import default_lr

LR_SHARE = 0.05
"""Of what fine-tuning takes: a policy that samples its own data breaks at rates that it stands."""
CPU_PASS_TOKENS, GPU_PASS_TOKENS = 4096, 16_384
CPU_PASS_LOGITS, GPU_PASS_LOGITS = 1 << 26, 1 << 29
"""Logits of a forward and backward pass at most: 256 MB and 2 GB in float32."""


@dataclass(frozen=True)
class PpoPlan:
    """What a run does; a run that resumes must have the same."""

    max_steps: int
    batch_size: int
    minibatches: int
    ppo_epochs: int
    pass_tokens: int
    lr: float
    value_lr: float
    schedule: str
    warmup_steps: int
    decay_steps: int
    min_lr: float
    precision: str
    eval_every: int
    save_every: int
    log_every: int

    def identity(self, config: PpoConfig) -> dict[str, Any]:
        """What decides the weights, by flag."""
        given = {k: v for k, v in config.recipe("ppo").items() if k not in UNDECISIVE}
        resolved = ("max_steps", "lr", "value_lr", "precision", "pass_tokens")
        return {
            **given,
            **{name: getattr(self, name) for name in resolved},
            "warmup": self.warmup_steps,
            "decay": self.decay_steps,
            "grad_accum": 1,
        }


UNDECISIVE = (
    *("stage", "threads", "processes", "device", "keep", "save_every", "eval_every", "log_every"),
    *("early_stop", "samples", "merge", "on_nan", "max_nan_skips", "skip_bad_rows"),
    *("model", "data", "val_data", "reward_model"),  # by their content instead
    *("episodes", "epochs"),  # by max_steps
)
"""Fields that change how a run goes or is shown, or are told in another way."""


def make_ppo_plan(
    config: PpoConfig, *, parameters: int, prompts: int, world: int, device: str
) -> PpoPlan:
    """Fill in what the user left open.

    Args:
        config: the command's fields.
        parameters: of the policy.
        prompts: to train on.
        world: number of processes.
        device: type of device.

    Raises:
        ResourceError: a precision that does not run here.
    """
    per_step = config.batch_size * world
    episodes = config.episodes or (config.epochs or 1) * prompts * config.num_samples
    steps = config.max_steps or max(1, round(episodes / per_step))
    tenth = max(1, steps // 10)
    lr = config.lr or default_ppo_lr(parameters, has_adapter=config.has_adapter)
    return PpoPlan(
        max_steps=steps,
        batch_size=config.batch_size,
        minibatches=config.minibatches,
        ppo_epochs=config.ppo_epochs,
        pass_tokens=config.pass_tokens
        or (GPU_PASS_TOKENS if device == "cuda" else CPU_PASS_TOKENS),
        lr=lr,
        value_lr=config.value_lr or lr,
        schedule=config.schedule,
        warmup_steps=warmup_steps(config, steps),
        decay_steps=round(config.decay * steps) if config.schedule == "wsd" else 0,
        min_lr=config.min_lr,
        precision=choose_precision(config, parameters, device),
        eval_every=config.eval_every or tenth,
        save_every=config.save_every or tenth,
        log_every=config.log_every,
    )


def default_ppo_lr(parameters: int, *, has_adapter: bool) -> float:
    """A peak learning rate that suits the size."""
    return float(f"{LR_SHARE * default_lr(parameters, has_adapter=has_adapter):.2g}")

"""`llmctl ppo`: a model, prompts and rewards in, an aligned model or adapter out."""

from functools import partial
from typing import Any

import torch
from accelerate import Accelerator

from llmctl import hardware
from llmctl.config.commands.ppo import PpoConfig
from llmctl.ppo.export import export, log_summary
from llmctl.ppo.loop import fit, resume
from llmctl.ppo.setup import build_ppo, prepare_ppo
from llmctl.runs.directory import Run
from llmctl.training.distributed import wait_for_peers
from llmctl.training.fault_tolerance import together
from llmctl.training.hyperparameters import Hyperparameters
from llmctl.training.stage import clock_of, run_stage


def run(config: PpoConfig) -> dict[str, Any] | None:
    """Train and return the final metrics."""
    return run_stage("ppo", config, partial(_show, config), partial(_align, config))


def _show(config: PpoConfig, accelerator: Accelerator, device: str) -> dict[str, Any] | None:
    """Show a dry run: recipe and outlook."""
    from llmctl.planning.outlook import show_dry_run  # which training does without
    from llmctl.planning.recipe import ppo_outlook

    prepared = prepare_ppo(config, accelerator, device)
    return show_dry_run("ppo", config, ppo_outlook(config, prepared, device))


def _align(config: PpoConfig, run: Run, accelerator: Accelerator, device: str) -> dict[str, Any]:
    """Prepare, train, export; return the result."""
    clock = clock_of(config, run)
    with together(accelerator):
        prepared = prepare_ppo(config, accelerator, device, clock)
    run.record(**prepared.manifest_entries(device))
    with hardware.memory_errors(hint=_smaller(prepared.hyperparameters)):
        threads = torch.get_num_threads()
        trainer, win_rate = build_ppo(config, prepared, run, accelerator, device, threads)
        resume(trainer, config)
        run.keep_recipe(config)
        wait_for_peers(accelerator, config.peer_timeout)
        metrics = fit(trainer, win_rate)
    log_summary(trainer.state)
    return {**export(config, trainer, prepared), **prepared.sizes, **metrics}


def _smaller(values: Hyperparameters) -> str:
    """Return what to type where memory runs out; the episodes stay the same."""
    assert values.ppo is not None
    return (
        f"try --pass-tokens {max(1, values.ppo.pass_tokens // 2)} (to go on from a checkpoint, "
        "with --resume --resume-allow pass_tokens), or a smaller --rollout-batch-size"
    )

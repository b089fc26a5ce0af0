"""`llmctl ppo`: a model, prompts and rewards in, an aligned model or adapter out."""

from functools import partial
from typing import Any

import torch
from accelerate import Accelerator

from llmctl import hardware
from llmctl.config.commands import PpoConfig
from llmctl.models.loading import parameter_count
from llmctl.planning.outlook import outlook, show_dry_run
from llmctl.planning.recipe import ppo_work, shape_to_train
from llmctl.ppo.export import export, log_summary
from llmctl.ppo.loop import fit, resume
from llmctl.ppo.setup import build, prepare
from llmctl.runs.directory import Run
from llmctl.training.fault_tolerance import together
from llmctl.training.stage import clock_of, run_stage


def run(config: PpoConfig) -> dict[str, Any] | None:
    """Train and return the final metrics."""
    return run_stage("ppo", config, partial(_show, config), partial(_align, config))


def _show(config: PpoConfig, accelerator: Accelerator, device: str) -> dict[str, Any] | None:
    """Do what a dry run does."""
    setup = prepare(config, accelerator, device)
    policy = setup.models.actors.policy
    judges = (judge for judge in setup.models.judges if not judge.is_shared)
    work = ppo_work(
        config,
        setup.hyperparameters,
        shape_to_train(policy.config),
        [len(tokens) for tokens in setup.asked.tokens],
        setup.trained_parameters,
        sum(parameter_count(judge.model.model) for judge in judges),
        device=device,
        world=accelerator.num_processes,
    )
    return show_dry_run("ppo", config, outlook(work, policy.config.get_text_config()))


def _align(config: PpoConfig, run: Run, accelerator: Accelerator, device: str) -> dict[str, Any]:
    """Prepare, train, export; return what came of it."""
    clock = clock_of(config, run)
    with together(accelerator):
        setup = prepare(config, accelerator, device, clock)
    run.record(**setup.facts(device))
    with hardware.memory_errors(setup.hyperparameters.batch_size):
        trainer, judge = build(config, setup, run, accelerator, device, torch.get_num_threads())
        resume(trainer, config)
        run.keep_recipe(config)
        metrics = fit(trainer, judge)
    log_summary(trainer.state)
    sizes = {"parameters": setup.parameters, "trained_parameters": setup.trained_parameters}
    return {**export(config, trainer, setup), **sizes, **metrics}

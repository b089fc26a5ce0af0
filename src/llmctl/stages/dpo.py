"""`llmctl dpo`: preferences and a model in, an aligned model or adapter out."""

from functools import partial
from typing import Any

from accelerate import Accelerator

from llmctl import hardware
from llmctl.config.stages import DpoConfig
from llmctl.data.dpo import load_pairs, log_pairs
from llmctl.data.preferred import PreferenceData
from llmctl.planning.found import counted_share, foreseen
from llmctl.planning.outlook import Outlook
from llmctl.rundir import Run
from llmctl.training.dpo_setup import build, prepare
from llmctl.training.export import export
from llmctl.training.guard import together
from llmctl.training.stage import clock_of, run_stage


def run(config: DpoConfig) -> dict[str, Any] | None:
    """Align and return the final metrics."""
    return run_stage(
        "dpo",
        config,
        partial(_check, config),
        partial(_align, config),
    )


def _check(config: DpoConfig, accelerator: Accelerator, device: str) -> Outlook:
    """What a dry run does."""
    data = _pairs(config, accelerator)
    found = prepare(config, data, accelerator, device)
    share = counted_share(data.train.chosen, data.train.rejected)
    world = accelerator.num_processes
    return foreseen(config, found, found.train.lengths, device, world, share)


def _align(config: DpoConfig, run: Run, accelerator: Accelerator, device: str) -> dict[str, Any]:
    """Train, export; what came of it."""
    clock = clock_of(config, run)
    with together(accelerator):
        data = _pairs(config, accelerator, clock)
    with together(accelerator):
        found = prepare(config, data, accelerator, device)
    run.record(**found.facts(data, device))
    with hardware.memory_errors(found.plan.batch_size, found.plan.grad_accum):
        trainer = build(config, data, found, run)
        metrics = trainer.fit(config)
    sizes = {"parameters": found.parameters, "trained_parameters": found.trained_parameters}
    return {**export(config, trainer, found.base, data.tokenizer), **sizes, **metrics}


def _pairs(config: DpoConfig, accelerator: Accelerator, clock: str | None = None) -> PreferenceData:
    """The pairs, found to be sound."""
    data = load_pairs(config, clock)
    if accelerator.is_main_process:
        log_pairs(data)
    return data

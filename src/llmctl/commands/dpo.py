"""`llmctl dpo`: preferences and a model in, an aligned model or adapter out."""

from functools import partial
from typing import Any

from accelerate import Accelerator

from llmctl import hardware
from llmctl.config.commands.dpo import DpoConfig
from llmctl.data.preference_pairs import load_dpo_data, log_dpo_data
from llmctl.runs.directory import Run
from llmctl.training.dpo import build_dpo, prepare_dpo
from llmctl.training.export import export
from llmctl.training.fault_tolerance import together
from llmctl.training.loop import train
from llmctl.training.stage import clock_of, run_stage


def run(config: DpoConfig) -> dict[str, Any] | None:
    """Align and return the final metrics."""
    return run_stage("dpo", config, partial(_show, config), partial(_align, config))


def _show(config: DpoConfig, accelerator: Accelerator, device: str) -> dict[str, Any] | None:
    """Show a dry run: recipe and outlook."""
    from llmctl.planning.outlook import show_dry_run  # which training does without
    from llmctl.planning.recipe import finetuning_outlook, trained_share

    data = load_dpo_data(config, None)
    log_dpo_data(data)
    prepared = prepare_dpo(config, data, accelerator, device)
    share = trained_share(data.train.chosen, data.train.rejected)
    return show_dry_run("dpo", config, finetuning_outlook(config, prepared, device, share))


def _align(config: DpoConfig, run: Run, accelerator: Accelerator, device: str) -> dict[str, Any]:
    """Load, prepare, train, export; return the result."""
    clock = clock_of(config, run)
    with together(accelerator):
        data = load_dpo_data(config, clock)
    log_dpo_data(data)
    with together(accelerator):
        prepared = prepare_dpo(config, data, accelerator, device)
    audit = data.statistics()
    run.record(**prepared.facts(data.inputs, device, audit=audit, held_out=data.held_out))
    with hardware.memory_errors(*prepared.batch):
        trainer = build_dpo(config, data, prepared, run, accelerator, device)
        metrics = train(trainer, config)
    return {**export(config, trainer, prepared, data.tokenizer), **prepared.sizes, **metrics}

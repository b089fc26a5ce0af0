"""`llmctl sft`: examples and a model in, a fine-tuned model, adapter or classifier out."""

from functools import partial
from typing import Any

from accelerate import Accelerator

from llmctl import hardware
from llmctl.config.commands.sft import SftConfig
from llmctl.data.audit.audit import Audit
from llmctl.data.classification import load_classification_data, log_classification_data
from llmctl.data.sft import SftData, load_sft_data
from llmctl.runs.directory import Run
from llmctl.training.classify import build_classification, prepare_classification
from llmctl.training.export import export
from llmctl.training.fault_tolerance import together
from llmctl.training.loop import train
from llmctl.training.sft import audited, build_sft, prepare_sft
from llmctl.training.stage import clock_of, run_stage


def run(config: SftConfig) -> dict[str, Any] | None:
    """Fine-tune and return the final metrics."""
    is_chat = config.task == "chat"
    return run_stage(
        "sft",
        config,
        partial(_show if is_chat else _show_classification, config),
        partial(_tune if is_chat else _classify, config),
    )


def _show(config: SftConfig, accelerator: Accelerator, device: str) -> dict[str, Any] | None:
    """Show a dry run: recipe and outlook."""
    from llmctl.planning.outlook import show_dry_run  # which training does without
    from llmctl.planning.recipe import finetuning_outlook, trained_share

    data, _ = _examples(config, accelerator)
    prepared = prepare_sft(config, data, accelerator, device)
    outlook = finetuning_outlook(config, prepared, device, trained_share(data.train))
    return show_dry_run("sft", config, outlook)


def _tune(config: SftConfig, run: Run, accelerator: Accelerator, device: str) -> dict[str, Any]:
    """Load, prepare, train, export; return the result."""
    clock = clock_of(config, run)
    with together(accelerator):
        data, report = _examples(config, accelerator, clock)
    with together(accelerator):
        prepared = prepare_sft(config, data, accelerator, device)
    run.record(
        **prepared.facts(
            data.inputs,
            device,
            rows=len(prepared.train),
            audit=report.as_json(),
            held_out=[example.name for example in data.val_examples],
        )
    )
    with hardware.memory_errors(*prepared.batch):
        trainer = build_sft(config, data, prepared, run, accelerator, device)
        metrics = train(trainer, config)
    return {**export(config, trainer, prepared, data.tokenizer), **prepared.sizes, **metrics}


def _show_classification(
    config: SftConfig, accelerator: Accelerator, device: str
) -> dict[str, Any] | None:
    """Show a dry run with `--task classify`."""
    from llmctl.planning.outlook import show_dry_run  # which training does without
    from llmctl.planning.recipe import finetuning_outlook

    data = load_classification_data(config)
    log_classification_data(data)
    prepared = prepare_classification(config, data, accelerator, device)
    return show_dry_run("sft", config, finetuning_outlook(config, prepared, device))


def _classify(config: SftConfig, run: Run, accelerator: Accelerator, device: str) -> dict[str, Any]:
    """Load, prepare, train, export a classifier; return the result."""
    with together(accelerator):
        data = load_classification_data(config)
    log_classification_data(data)
    with together(accelerator):
        prepared = prepare_classification(config, data, accelerator, device)
    run.record(
        **prepared.facts(
            data.split.inputs,
            device,
            labels=list(data.labels),
            audit=data.statistics(),
            held_out=[example.name for example in data.split.val],
        )
    )
    with hardware.memory_errors(*prepared.batch):
        trainer = build_classification(config, data, prepared, run, accelerator, device)
        metrics = train(trainer, config)
    return {**prepared.sizes, **export(config, trainer, prepared, data.tokenizer), **metrics}


def _examples(
    config: SftConfig, accelerator: Accelerator, clock: str | None = None
) -> tuple[SftData, Audit]:
    """Load and audit the examples; return the audit, too."""
    data = load_sft_data(config, config.prompt_tuning or 0, clock)
    return audited(config, data, is_main=accelerator.is_main_process)

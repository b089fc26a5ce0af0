"""`llmctl sft`: examples and a model in, a fine-tuned model, adapter or classifier out."""

from functools import partial
from typing import Any

from accelerate import Accelerator

from llmctl import hardware
from llmctl.config.stages import SftConfig
from llmctl.data.audit import Audit
from llmctl.data.supervised import SupervisedData, load_supervised
from llmctl.planning.found import counted_share, foreseen
from llmctl.planning.outlook import Outlook
from llmctl.rundir import Run
from llmctl.training.classify import check_classifier, run_classifier
from llmctl.training.export import export
from llmctl.training.finetune import audited, build, prepare
from llmctl.training.guard import together
from llmctl.training.stage import clock_of, run_stage


def run(config: SftConfig) -> dict[str, Any] | None:
    """Fine-tune and return the final metrics."""
    return run_stage(
        "sft",
        config,
        partial(_check, config),
        partial(_tune, config),
    )


def _check(config: SftConfig, accelerator: Accelerator, device: str) -> Outlook:
    """What a dry run does."""
    world = accelerator.num_processes
    if config.task == "classify":
        labelled, found = check_classifier(config, accelerator, device)
        return foreseen(config, found, labelled.train.lengths, device, world)
    data, _ = _examples(config, accelerator)
    tuning = prepare(config, data, accelerator, device)
    share = counted_share(data.train)
    return foreseen(config, tuning, tuning.train.lengths, device, world, share)


def _tune(config: SftConfig, run: Run, accelerator: Accelerator, device: str) -> dict[str, Any]:
    """Train, export; what came of it."""
    if config.task == "classify":
        return run_classifier(config, run, accelerator, device)
    clock = clock_of(config, run)
    with together(accelerator):
        data, report = _examples(config, accelerator, clock)
    with together(accelerator):
        tuning = prepare(config, data, accelerator, device)
    run.record(**tuning.facts(data, report, device))
    with hardware.memory_errors(tuning.plan.batch_size, tuning.plan.grad_accum):
        trainer = build(config, data, tuning, run)
        metrics = trainer.fit(config)
    sizes = {"parameters": tuning.parameters, "trained_parameters": tuning.trained_parameters}
    return {**export(config, trainer, tuning.base, data.tokenizer), **sizes, **metrics}


def _examples(
    config: SftConfig, accelerator: Accelerator, clock: str | None = None
) -> tuple[SupervisedData, Audit]:
    """The examples, found to be sound, and the report on them."""
    data = load_supervised(config, config.prompt_tuning or 0, clock)
    return audited(config, data, is_main=accelerator.is_main_process)

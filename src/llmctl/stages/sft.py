"""`llmctl sft`: examples and a model in, a fine-tuned model, adapter or classifier out."""

from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from llmctl import hardware
from llmctl.config.stages import SftConfig
from llmctl.data.audit import Audit
from llmctl.data.supervised import SupervisedData, load_supervised
from llmctl.resume import earlier_manifest
from llmctl.rundir import Run
from llmctl.training.classify import check_classifier, run_classifier
from llmctl.training.export import export
from llmctl.training.finetune import audited, build, prepare
from llmctl.training.guard import open_together, together
from llmctl.training.placement import make_accelerator


def run(config: SftConfig) -> dict[str, Any] | None:
    """Fine-tune and return the final metrics."""
    threads = hardware.set_threads(config.threads or earlier_manifest(config).get("threads"))
    accelerator, device = make_accelerator(config)
    if config.dry_run:
        if config.task == "classify":
            check_classifier(config, accelerator, device)
        else:
            prepare(config, _examples(config, accelerator)[0], accelerator, device)
        if accelerator.is_main_process:
            print(config.to_yaml("sft"), end="")
        return None
    with open_together(accelerator, "sft", config) as run:
        run.record(threads=threads)
        result: dict[str, Any] = {"stage": "sft", "out": str(run.path), "status": "completed"}
        result |= _tune(config, run, accelerator, device)
        run.record(result=result)
    return result


def _tune(config: SftConfig, run: Run, accelerator: Accelerator, device: str) -> dict[str, Any]:
    """Train, export; what came of it."""
    if config.task == "classify":
        return run_classifier(config, run, accelerator, device)
    clock = earlier_manifest(config).get("clock") or run.manifest.get("started")
    (clock,) = broadcast_object_list([clock])  # a template may write the date
    with together(accelerator):
        data, report = _examples(config, accelerator, clock)
    run.record(clock=clock)
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

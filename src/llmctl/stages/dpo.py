"""`llmctl dpo`: preferences and a model in, an aligned model or adapter out."""

from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from llmctl import hardware
from llmctl.config.stages import DpoConfig
from llmctl.data.dpo import load_pairs, log_pairs
from llmctl.data.preferred import PreferenceData
from llmctl.resume import earlier_manifest
from llmctl.rundir import Run
from llmctl.training.dpo_setup import build, prepare
from llmctl.training.export import export
from llmctl.training.guard import open_together, together
from llmctl.training.placement import make_accelerator


def run(config: DpoConfig) -> dict[str, Any] | None:
    """Align and return the final metrics."""
    threads = hardware.set_threads(config.threads or earlier_manifest(config).get("threads"))
    accelerator, device = make_accelerator(config)
    if config.dry_run:
        prepare(config, _pairs(config, accelerator), accelerator, device)
        if accelerator.is_main_process:
            print(config.to_yaml("dpo"), end="")
        return None
    with open_together(accelerator, "dpo", config) as run:
        run.record(threads=threads)
        result: dict[str, Any] = {"stage": "dpo", "out": str(run.path), "status": "completed"}
        result |= _align(config, run, accelerator, device)
        run.record(result=result)
    return result


def _align(config: DpoConfig, run: Run, accelerator: Accelerator, device: str) -> dict[str, Any]:
    """Train, export; what came of it."""
    clock = earlier_manifest(config).get("clock") or run.manifest.get("started")
    (clock,) = broadcast_object_list([clock])  # a template may write the date
    with together(accelerator):
        data = _pairs(config, accelerator, clock)
    run.record(clock=clock)
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

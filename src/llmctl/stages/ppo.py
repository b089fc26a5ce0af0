"""`llmctl ppo`: a model, prompts and rewards in, an aligned model or adapter out."""

from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from llmctl import hardware
from llmctl.config.stages import PpoConfig
from llmctl.ppo.export import export
from llmctl.ppo.loop import fit, resume
from llmctl.ppo.setup import build, prepare
from llmctl.ppo.summary import log_summary
from llmctl.resume import earlier_manifest
from llmctl.rundir import Run
from llmctl.training.guard import open_together, together
from llmctl.training.placement import make_accelerator


def run(config: PpoConfig) -> dict[str, Any] | None:
    """Train and return the final metrics."""
    threads = hardware.set_threads(config.threads or earlier_manifest(config).get("threads"))
    accelerator, device = make_accelerator(config)
    if config.dry_run:
        prepare(config, accelerator, device)
        if accelerator.is_main_process:
            print(config.to_yaml("ppo"), end="")
        return None
    with open_together(accelerator, "ppo", config) as run:
        run.record(threads=threads)
        result: dict[str, Any] = {"stage": "ppo", "out": str(run.path), "status": "completed"}
        result |= _align(config, run, accelerator, device, threads)
        run.record(result=result)
    return result


def _align(
    config: PpoConfig, run: Run, accelerator: Accelerator, device: str, threads: int
) -> dict[str, Any]:
    """Train, export; what came of it."""
    clock = earlier_manifest(config).get("clock") or run.manifest.get("started")
    (clock,) = broadcast_object_list([clock])  # a template may write the date
    run.record(clock=clock)
    with together(accelerator):
        setup = prepare(config, accelerator, device, clock)
    run.record(**setup.facts(device))
    with hardware.memory_errors(setup.plan.batch_size):
        trainer, judge = build(config, setup, run, accelerator, device, threads)
        resume(trainer, config)
        run.keep_recipe(config)
        metrics = fit(trainer, judge)
    log_summary(trainer.job)
    sizes = {"parameters": setup.parameters, "trained_parameters": setup.trained_parameters}
    return {**export(config, trainer, setup), **sizes, **metrics}

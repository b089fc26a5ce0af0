"""`llmctl reward`: preferences and a model in, a reward model out; or texts in, scores out."""

from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from llmctl import hardware
from llmctl.config.stages import RewardConfig
from llmctl.data.preferred import PreferenceData, load_preferences, log_preferences
from llmctl.exchanges import score_file
from llmctl.resume import earlier_manifest
from llmctl.rundir import Run
from llmctl.training.guard import open_together, together
from llmctl.training.placement import make_accelerator
from llmctl.training.reward import build, export, prepare


def run(config: RewardConfig) -> dict[str, Any] | None:
    """Train and return the final metrics, or score a file."""
    if config.score is not None:
        return score_file(config)
    threads = hardware.set_threads(config.threads or earlier_manifest(config).get("threads"))
    accelerator, device = make_accelerator(config)
    if config.dry_run:
        prepare(config, _preferences(config, accelerator), accelerator, device)
        if accelerator.is_main_process:
            print(config.to_yaml("reward"), end="")
        return None
    with open_together(accelerator, "reward", config) as run:
        run.record(threads=threads)
        result: dict[str, Any] = {"stage": "reward", "out": str(run.path), "status": "completed"}
        result |= _train(config, run, accelerator, device)
        run.record(result=result)
    return result


def _train(config: RewardConfig, run: Run, accelerator: Accelerator, device: str) -> dict[str, Any]:
    """Train, export, judge; what came of it."""
    clock = earlier_manifest(config).get("clock") or run.manifest.get("started")
    (clock,) = broadcast_object_list([clock])  # a template may write the date
    with together(accelerator):
        data = _preferences(config, accelerator, clock)
    run.record(clock=clock)
    with together(accelerator):
        found = prepare(config, data, accelerator, device)
    run.record(**found.facts(data, device))
    with hardware.memory_errors(found.plan.batch_size, found.plan.grad_accum):
        trainer = build(config, data, found, run)
        metrics = trainer.fit(config)
    sizes = {"parameters": found.parameters, "trained_parameters": found.trained_parameters}
    return {**metrics, **sizes, **export(config, trainer, found, data)}


def _preferences(
    config: RewardConfig, accelerator: Accelerator, clock: str | None = None
) -> PreferenceData:
    """The pairs, and a word on them."""
    data = load_preferences(config, clock)
    if accelerator.is_main_process:
        log_preferences(data)
    return data

"""`llmctl reward`: preferences and a model in, a reward model out; or texts in, scores out."""

from functools import partial
from typing import Any

from accelerate import Accelerator

from llmctl import hardware
from llmctl.config.stages import RewardConfig
from llmctl.data.preferred import PreferenceData, load_preferences, log_preferences
from llmctl.exchanges import score_file
from llmctl.planning.found import foreseen
from llmctl.planning.outlook import Outlook
from llmctl.rundir import Run
from llmctl.training.guard import together
from llmctl.training.reward import build, export, prepare
from llmctl.training.stage import clock_of, run_stage


def run(config: RewardConfig) -> dict[str, Any] | None:
    """Train and return the final metrics, or score a file."""
    if config.score is not None:
        return score_file(config)
    return run_stage(
        "reward",
        config,
        partial(_check, config),
        partial(_train, config),
    )


def _check(config: RewardConfig, accelerator: Accelerator, device: str) -> Outlook:
    """What a dry run does."""
    found = prepare(config, _preferences(config, accelerator), accelerator, device)
    lengths = found.train.pairs.lengths
    return foreseen(config, found, lengths, device, accelerator.num_processes)


def _train(config: RewardConfig, run: Run, accelerator: Accelerator, device: str) -> dict[str, Any]:
    """Train, export, judge; what came of it."""
    clock = clock_of(config, run)
    with together(accelerator):
        data = _preferences(config, accelerator, clock)
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

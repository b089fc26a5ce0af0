"""`llmctl reward`: preferences and a model in, a reward model out; or texts in, scores out."""

from functools import partial
from typing import Any

from accelerate import Accelerator

from llmctl import hardware
from llmctl.config.commands.reward import RewardConfig
from llmctl.data.preference_pairs import load_reward_data, log_reward_data
from llmctl.reward.score_file import score_file
from llmctl.runs.directory import Run
from llmctl.training.export import export
from llmctl.training.fault_tolerance import together
from llmctl.training.loop import train
from llmctl.training.reward import build_reward, check_of, prepare_reward
from llmctl.training.stage import clock_of, run_stage


def run(config: RewardConfig) -> dict[str, Any] | None:
    """Train and return the final metrics, or score a file."""
    if config.score is not None:
        return score_file(config)
    return run_stage("reward", config, partial(_show, config), partial(_train, config))


def _show(config: RewardConfig, accelerator: Accelerator, device: str) -> dict[str, Any] | None:
    """Show a dry run: recipe and outlook."""
    from llmctl.planning.outlook import show_dry_run  # which training does without
    from llmctl.planning.recipe import finetuning_outlook

    data = load_reward_data(config, None)
    log_reward_data(data)
    prepared = prepare_reward(config, data, accelerator, device)
    return show_dry_run("reward", config, finetuning_outlook(config, prepared, device))


def _train(config: RewardConfig, run: Run, accelerator: Accelerator, device: str) -> dict[str, Any]:
    """Load, prepare, train, export; return the result."""
    clock = clock_of(config, run)
    with together(accelerator):
        data = load_reward_data(config, clock)
    log_reward_data(data)
    with together(accelerator):
        prepared = prepare_reward(config, data, accelerator, device)
    facts = {"audit": data.statistics(), "held_out": data.held_out}
    facts["score_at"] = prepared.model.config.score_at
    run.record(**prepared.facts(data.inputs, device, **facts))
    with hardware.memory_errors(*prepared.batch):
        trainer = build_reward(config, data, prepared, run, accelerator, device)
        metrics = train(trainer, config)
    check = check_of(prepared, run, device)
    written = export(config, trainer, prepared, data.tokenizer, check)
    return {**metrics, **prepared.sizes, **written}

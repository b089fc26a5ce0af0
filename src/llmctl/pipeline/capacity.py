"""Whether there is memory for each stage, and disk for all of them.

What is counted is the least that a stage takes, with sequences of one token: what is refused could
not have run.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from shutil import disk_usage

from llmctl import hardware
from llmctl.config.commands import (
    DpoConfig,
    PlanConfig,
    PpoConfig,
    PretrainConfig,
    RewardConfig,
    SftConfig,
)
from llmctl.config.finetuning import LowRank
from llmctl.config.sections import Resumable
from llmctl.console import log
from llmctl.errors import ResourceError
from llmctl.files import no_space
from llmctl.models import presets
from llmctl.numbers import byte_size
from llmctl.pipeline.predicted import Foretold
from llmctl.pipeline.references import Stage
from llmctl.planning.memory import estimate_memory
from llmctl.planning.outlook import device_memory
from llmctl.planning.recipe import plan_recipe

WEIGHT, CHECKPOINT = 4, 12
"""Bytes of a parameter in `model/`, and in a checkpoint with AdamW's two moments."""


def require_room(stages: Sequence[Stage], models: Mapping[str, Foretold]) -> None:
    """Refuse a life cycle that cannot fit.

    Args:
        stages: in order.
        models: what each of them trains, by its name.

    Raises:
        ResourceError: too little memory or disk, with the numbers.
    """
    for stage in stages:
        needed = least_memory(stage, models[stage.name])
        on_cpu = _device(stage) == "cpu"
        left = hardware.memory_left() if on_cpu else device_memory("cuda")
        log.debug("stage %s: at least %s of memory", stage.name, byte_size(needed))
        if needed > left:
            raise stage.wrong(
                ResourceError(
                    f"{byte_size(needed)} of memory needed at the least, {byte_size(left)} there",
                    file=stage.file,
                    line=stage.line,
                    hint="a smaller model, or lora with load_in_4bit; see llmctl plan",
                )
            )
    bytes_needed = sum(disk_of(stage, models[stage.name]) for stage in stages)
    there = next((p for s in stages for p in s.out.absolute().parents if p.exists()), Path("/"))
    if bytes_needed > disk_usage(there).free:
        raise no_space(there, bytes_needed)


def least_memory(stage: Stage, model: Foretold) -> float:
    """Bytes that a stage takes on a device, as `llmctl plan` counts; 0 where nothing is known."""
    config = stage.config
    trains = PretrainConfig | SftConfig | RewardConfig | DpoConfig | PpoConfig
    if model.shape is None or not isinstance(config, trains):
        return 0.0
    with tempfile.TemporaryDirectory(prefix="llmctl-") as folder:
        model.shape.save_pretrained(folder)
        asked = PlanConfig(shape=folder, length=1, devices=stage.processes)
        workload, _, _ = plan_recipe(config, asked, _device(stage))
    return estimate_memory(workload).peak


def disk_of(stage: Stage, model: Foretold) -> int:
    """Bytes that a stage leaves, its checkpoints included; adapters are small."""
    config = stage.config
    if model.shape is None or not isinstance(config, Resumable):
        return 0
    if isinstance(config, LowRank) and config.has_adapter:
        return 0
    return presets.count_parameters(model.shape) * (WEIGHT + CHECKPOINT * (max(2, config.keep) + 1))


def _device(stage: Stage) -> str:
    return hardware.pick_device(str(dict(stage.config).get("device", "auto")))

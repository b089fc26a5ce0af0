"""Check that there is memory for each stage, and disk for all of them.

Counted is the least that a stage takes, with sequences of one token: what is refused could not
have run.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from shutil import disk_usage

from llmctl import hardware
from llmctl.config.commands.plan import PlanConfig
from llmctl.config.finetuning import LowRank
from llmctl.config.sections import Resumable
from llmctl.console import log
from llmctl.errors import ResourceError
from llmctl.files import no_space
from llmctl.models import presets
from llmctl.numbers import byte_size
from llmctl.pipeline.predicted import PredictedModel
from llmctl.pipeline.references import Stage
from llmctl.planning.memory import estimate_memory
from llmctl.planning.outlook import device_memory
from llmctl.planning.recipe import Recipe, plan_recipe

WEIGHT, CHECKPOINT = 4, 12
"""Bytes of a parameter in `model/`, and in a checkpoint with AdamW's two moments."""


def require_capacity(stages: Sequence[Stage], models: Mapping[str, PredictedModel]) -> None:
    """Refuse a life cycle that cannot fit; `models` are those that the stages train, by name.

    Raises:
        ResourceError: too little memory or disk, with the numbers.
    """
    for stage in stages:
        needed = minimum_memory(stage, models[stage.name])
        on_cpu = _device(stage) == "cpu"
        left = hardware.memory_left() if on_cpu else device_memory("cuda")
        log.debug("stage %s: at least %s of memory", stage.name, byte_size(needed))
        if needed > left:
            text = f"{byte_size(needed)} of memory needed at the least, {byte_size(left)} there"
            hint = "a smaller model, or lora with load_in_4bit; see llmctl plan"
            raise stage.named_in(stage.error(ResourceError, text, hint))
    needed_bytes = sum(disk_space(stage, models[stage.name]) for stage in stages)
    there = next((p for s in stages for p in s.out.absolute().parents if p.exists()), Path("/"))
    if needed_bytes > disk_usage(there).free:
        raise no_space(there, needed_bytes)


def minimum_memory(stage: Stage, model: PredictedModel) -> float:
    """Return the bytes that a stage takes on a device at the least; 0 where nothing is known."""
    config = stage.config
    if model.shape is None or not isinstance(config, Recipe):
        return 0.0
    with tempfile.TemporaryDirectory(prefix="llmctl-") as folder:
        model.shape.save_pretrained(folder)
        plan = PlanConfig(shape=folder, length=1, devices=stage.processes)
        workload, _, _ = plan_recipe(config, plan, _device(stage))
    return estimate_memory(workload).peak


def disk_space(stage: Stage, model: PredictedModel) -> int:
    """Return the bytes that a stage writes, with its checkpoints; adapters are not counted."""
    config = stage.config
    if model.shape is None or not isinstance(config, Resumable):
        return 0
    if isinstance(config, LowRank) and config.has_adapter:
        return 0
    return presets.count_parameters(model.shape) * (WEIGHT + CHECKPOINT * (max(2, config.keep) + 1))


def _device(stage: Stage) -> str:
    return hardware.pick_device(str(dict(stage.config).get("device", "auto")))

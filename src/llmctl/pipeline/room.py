"""Whether there is memory for each stage, and disk for all of them.

Rules of thumb, on the safe side of refusing too much: what is refused could not have run.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from shutil import disk_usage

from llmctl import hardware
from llmctl.config.sections import Resumable
from llmctl.config.stages import PpoConfig
from llmctl.config.supervised import LowRank
from llmctl.console import short
from llmctl.errors import ResourceError
from llmctl.files import no_space
from llmctl.pipeline.foretold import Foretold
from llmctl.pipeline.references import Stage

WEIGHT, TRAINED = 4, 16
"""Bytes for a parameter in float32: to hold it, and to train it with AdamW (Rajbhandari et al.,
2020, arXiv:1910.02054: weight, gradient, two moments)."""
CHECKPOINT = 12
"""Bytes of a parameter in a checkpoint: the weight and two moments."""


def require_room(stages: Sequence[Stage], known: Mapping[str, Foretold]) -> None:
    """Refuse a life cycle that cannot fit.

    Raises:
        ResourceError: too little memory or disk, with the numbers.
    """
    for stage in stages:
        needed = memory_of(stage, known[stage.name])
        left = hardware.memory_left() if _on_cpu(stage) else None
        if left is not None and needed > left:
            raise stage.wrong(
                ResourceError(
                    f"about {short(needed)}B of memory needed at the least, {short(left)}B left",
                    file=stage.file,
                    line=stage.line,
                    hint="a smaller model, or lora with load_in_4bit",
                )
            )
    if not stages:
        return
    needed = sum(disk_of(stage, known[stage.name]) for stage in stages)
    out = stages[0].out.absolute()
    there = next(folder for folder in out.parents if folder.exists())
    if needed > disk_usage(there).free:
        raise no_space(Path(there), needed)


def memory_of(stage: Stage, model: Foretold) -> int:
    """Bytes that the weights and what trains them take, activations not counted."""
    config = stage.config
    if model.parameters is None or not isinstance(config, Resumable):
        return 0
    frozen = isinstance(config, LowRank) and config.has_adapter
    models = 3 if isinstance(config, PpoConfig) and not frozen else 1  # reference, value model
    held = WEIGHT * model.parameters * (models - 1)
    if frozen:
        bits = dict(config)
        return model.parameters // (2 if bits.get("load_in_4bit") else 1)
    return held + TRAINED * model.parameters


def disk_of(stage: Stage, model: Foretold) -> int:
    """Bytes that a stage leaves, its checkpoints included."""
    config = stage.config
    if model.parameters is None or not isinstance(config, Resumable):
        return 0
    if isinstance(config, LowRank) and config.has_adapter:
        return 0
    kept = max(2, config.keep) + 1
    return model.parameters * (WEIGHT + CHECKPOINT * kept)


def _on_cpu(stage: Stage) -> bool:
    device = dict(stage.config).get("device", "cpu")
    return hardware.pick_device(str(device)) == "cpu"

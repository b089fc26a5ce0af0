"""What tests of run directories share."""

from pathlib import Path
from typing import Any

from llmctl.config.commands.pretrain import PretrainConfig


def config(out: Path, **flags: Any) -> PretrainConfig:
    """The least that a run directory can be opened for."""
    return PretrainConfig(tokens="t", out=out, **flags)

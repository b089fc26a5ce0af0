"""Configs of the commands around the stages: `demo`, `runs` and `doctor`."""

from pathlib import Path
from typing import Annotated

from pydantic import PositiveInt

from llmctl.config.base import Also, Argument, Config
from llmctl.config.sections import Control, PositiveCount, Reporting, StageConfig


class DemoConfig(StageConfig):
    """Tokenize, pretrain, generate and fine-tune on what every Python carries."""

    max_steps: Annotated[PositiveCount, Also("steps")] = 400
    """Optimizer steps of each training part."""

    threads: PositiveInt | None = None
    """CPU threads; by default the cores that this process may use."""


class RunsConfig(Config, Reporting):
    """List runs: how they went, how far they are, how to resume them."""

    directory: Annotated[Path | None, Argument("DIR"), Control] = None
    """Directory to look in; by default runs/ where there is one, else the current directory."""


class DoctorConfig(Config, Reporting):
    """Check the installation and the machine, with a fix for each flaw."""

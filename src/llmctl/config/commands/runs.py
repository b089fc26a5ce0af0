"""Config of `runs`."""

from pathlib import Path
from typing import Annotated

from llmctl.config.base import Argument, Config
from llmctl.config.sections import Control, Reporting


class RunsConfig(Config, Reporting):
    """List runs: how they went, how far they are, how to resume them."""

    directory: Annotated[Path | None, Argument("DIR"), Control] = None
    """Directory to look in; by default runs/ where there is one, else the current directory."""

"""Config of `doctor`."""

from llmctl.config.base import Config
from llmctl.config.sections import Reporting


class DoctorConfig(Config, Reporting):
    """Check the installation and the machine, with a fix for each flaw."""

"""Config of `demo`."""

from llmctl.config.sections import Stages


class DemoConfig(Stages):
    """Take a small model through its whole life, on what is built in."""

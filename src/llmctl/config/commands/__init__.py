"""One config class per command, each in a module of its name."""

from importlib import import_module
from importlib.util import find_spec

from llmctl.config.base import Config


def config_of(stage: str) -> type[Config] | None:
    """Return the config class of a command, None where there is no such command."""
    name = f"{__name__}.{stage}"
    if not stage.isidentifier() or find_spec(name) is None:
        return None
    config: type[Config] | None = getattr(import_module(name), f"{stage.capitalize()}Config", None)
    return config

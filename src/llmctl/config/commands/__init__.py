"""One config class per command, each in a module of its name."""

from importlib import import_module
from pkgutil import iter_modules

from llmctl.config.base import Config


def command_names() -> list[str]:
    """Return all commands, in the order of the alphabet."""
    return [module.name for module in iter_modules(__path__)]


def config_of(stage: str) -> type[Config] | None:
    """Return the config class of a command, None where there is no such command."""
    if stage not in command_names():
        return None
    module = import_module(f"{__name__}.{stage}")
    config: type[Config] = getattr(module, f"{stage.capitalize()}Config")
    return config

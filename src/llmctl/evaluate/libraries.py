"""Libraries that only some evaluations need: there, or refused with what to install."""

from importlib.util import find_spec

from llmctl.errors import ResourceError


def require_library(package: str, extra: str, purpose: str) -> None:
    """Refuse what cannot be computed here, before anything else is done.

    Raises:
        ResourceError: with the extra to install.
    """
    if find_spec(package) is None:
        name = package.replace("_", "-")
        raise ResourceError(
            f"{purpose} needs {name}, which is not installed",
            hint=f'pip install "llmctl[{extra}]"',
        )

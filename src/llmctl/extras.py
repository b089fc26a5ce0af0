"""Libraries that only some commands need: there, or refused with what to install."""

from importlib.util import find_spec

from llmctl.errors import ResourceError


def require_extra(package: str, extra: str, purpose: str) -> None:
    """Refuse what cannot be done here, before anything else is done.

    Args:
        package: as it is imported.
        extra: of llmctl, that brings it.
        purpose: what needs it.

    Raises:
        ResourceError: with the extra to install.
    """
    if find_spec(package) is None:
        name = package.replace("_", "-")
        raise ResourceError(
            f"{purpose} needs {name}, which is not installed",
            hint=f'run: pip install "llmctl[{extra}]"',
        )

"""Python and the packages, beside what llmctl asks for and what it was tested with."""

import platform
import re
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from llmctl import __version__
from llmctl.checkup.finding import Finding
from llmctl.runs.provenance import RECORDED

LEAST_PYTHON = (3, 11)
SHIPPED = Path(__file__).parents[1] / "constraints.txt"
"""Where the wheel has the tested set; a checkout has it at its root."""
NOT_FOR_USERS = ("dev", "docs")
ANEW = 'pip install --upgrade "llmctl"'


def check_python() -> Finding:
    """Python's version, and where it runs."""
    text = f"{platform.python_version()} ({sys.executable}), llmctl {__version__}"
    if sys.version_info < LEAST_PYTHON:
        return Finding("python", "failure", text, "use Python 3.11 or newer")
    return Finding("python", "ok", text)


def check_packages() -> Iterator[Finding]:
    """Packages that llmctl needs: one line for those that are right, one for each that is not."""
    try:
        needed = [Requirement(line) for line in requires("llmctl") or []]
    except PackageNotFoundError:
        yield Finding("packages", "warning", "llmctl is not installed, only on the path", ANEW)
        return
    tested, right = tested_versions(), []
    for requirement in needed:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        wrong = _judge(requirement, tested.get(canonicalize_name(requirement.name)))
        if wrong is None:
            right.append(requirement.name)
        else:
            yield wrong
    shown = [f"{name} {version(name)}" for name in RECORDED if name in right]
    rest = len(right) - len(shown)
    yield Finding("packages", "ok", ", ".join(shown) + f", and {rest} more, as tested")


def check_extras() -> Iterator[Finding]:
    """Optional packages: what is here, and what to type for what is not."""
    try:
        extras = metadata("llmctl").get_all("Provides-Extra") or []
    except PackageNotFoundError:
        return
    here, absent = [], []
    for extra in extras:
        if extra in NOT_FOR_USERS:
            continue
        for requirement in _requirements_of(extra):
            found = _version_of(requirement.name)
            if found is None:
                absent.append(extra)
            elif found not in requirement.specifier:
                text = f"{found}, where {requirement.specifier} is needed"
                yield Finding(requirement.name, "warning", text, f'pip install "llmctl[{extra}]"')
            else:
                here.append(f"{requirement.name} {found}")
    text = ", ".join(here) or "none"
    if absent:
        names = ",".join(dict.fromkeys(absent))
        text += f'; to add others: pip install "llmctl[{names}]"'
    yield Finding("extras", "ok", text)


def tested_versions() -> dict[str, str]:
    """Name -> version of the tested set, empty where it is not at hand."""
    places = (SHIPPED, SHIPPED.parents[2] / "constraints.txt")
    file = next((path for path in places if path.is_file()), None)
    lines = file.read_text().splitlines() if file else []
    pairs = (re.fullmatch(r"([\w.-]+)==(\S+)", line) for line in lines)
    return {canonicalize_name(pair[1]): pair[2] for pair in pairs if pair}


def _judge(requirement: Requirement, tested: str | None) -> Finding | None:
    """What is wrong with a package, if anything is."""
    name = requirement.name
    found = _version_of(name)
    asked = f"{name}{requirement.specifier}"
    if found is None:
        return Finding(name, "failure", f"missing; {asked} is needed", f'pip install "{asked}"')
    if found not in requirement.specifier:
        text = f"{found}, where {requirement.specifier} is needed"
        return Finding(name, "failure", text, f'pip install "{asked}"')
    if tested is not None and Version(tested).public != found.public:
        text = f"{found}; llmctl was tested with {tested}"
        return Finding(name, "warning", text, f'pip install "{name}=={tested}"')
    return None


def _version_of(name: str) -> Version | None:
    try:
        return Version(version(name))
    except PackageNotFoundError:
        return None


def _requirements_of(extra: str) -> Iterator[Requirement]:
    """What an extra adds to the packages that are needed anyway."""
    for line in requires("llmctl") or []:
        requirement = Requirement(line)
        marker = requirement.marker
        if marker and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""}):
            yield requirement

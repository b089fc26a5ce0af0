"""Check Python and the packages against what llmctl requires and was tested with."""

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
from llmctl.checkup import CheckResult
from llmctl.runs.provenance import RECORDED

MIN_PYTHON = (3, 11)
SHIPPED = Path(__file__).parents[1] / "constraints.txt"
"""Where the wheel has the tested set; a checkout has it at its root."""
NOT_FOR_USERS = ("dev", "docs")
REINSTALL = 'pip install --upgrade "llmctl"'


def check_python() -> CheckResult:
    """Check the version of Python."""
    text = f"{platform.python_version()} ({sys.executable}), llmctl {__version__}"
    if sys.version_info < MIN_PYTHON:
        return CheckResult("python", "failure", text, "use Python 3.11 or newer")
    return CheckResult("python", "ok", text)


def check_packages() -> Iterator[CheckResult]:
    """Check required packages: one line for those that are right, one for each that is not."""
    try:
        needed = [Requirement(line) for line in requires("llmctl") or []]
    except PackageNotFoundError:
        yield CheckResult(
            "packages", "warning", "llmctl is not installed, only on the path", REINSTALL
        )
        return
    tested, right = tested_versions(), []
    for requirement in needed:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        problem = _check(requirement, tested.get(canonicalize_name(requirement.name)))
        if problem is None:
            right.append(requirement.name)
        else:
            yield problem
    shown = [f"{name} {version(name)}" for name in RECORDED if name in right]
    rest = len(right) - len(shown)
    yield CheckResult("packages", "ok", ", ".join(shown) + f", and {rest} more, as tested")


def check_extras() -> Iterator[CheckResult]:
    """Check optional packages: which are installed, and what to type for the others."""
    try:
        extras = metadata("llmctl").get_all("Provides-Extra") or []
    except PackageNotFoundError:
        return
    installed, absent = [], []
    for extra in extras:
        if extra in NOT_FOR_USERS:
            continue
        for requirement in _requirements_of(extra):
            installed_version = _version_of(requirement.name)
            if installed_version is None:
                absent.append(extra)
            elif installed_version not in requirement.specifier:
                text = f"{installed_version}, where {requirement.specifier} is needed"
                yield CheckResult(
                    requirement.name, "warning", text, f'pip install "llmctl[{extra}]"'
                )
            else:
                installed.append(f"{requirement.name} {installed_version}")
    text = ", ".join(installed) or "none"
    if absent:
        names = ",".join(dict.fromkeys(absent))
        text += f'; to add others: pip install "llmctl[{names}]"'
    yield CheckResult("extras", "ok", text)


def tested_versions() -> dict[str, str]:
    """Map the names of the tested set to versions; empty where the file is missing."""
    places = (SHIPPED, SHIPPED.parents[2] / "constraints.txt")
    file = next((path for path in places if path.is_file()), None)
    lines = file.read_text().splitlines() if file else []
    pairs = (re.fullmatch(r"([\w.-]+)==(\S+)", line) for line in lines)
    return {canonicalize_name(pair[1]): pair[2] for pair in pairs if pair}


def _check(requirement: Requirement, tested: str | None) -> CheckResult | None:
    """The problem with a package, if there is one."""
    name = requirement.name
    installed = _version_of(name)
    required = f"{name}{requirement.specifier}"
    if installed is None:
        return CheckResult(
            name, "failure", f"missing; {required} is needed", f'pip install "{required}"'
        )
    if installed not in requirement.specifier:
        text = f"{installed}, where {requirement.specifier} is needed"
        return CheckResult(name, "failure", text, f'pip install "{required}"')
    if tested is not None and Version(tested).public != installed.public:
        text = f"{installed}; llmctl was tested with {tested}"
        return CheckResult(name, "warning", text, f'pip install "{name}=={tested}"')
    return None


def _version_of(name: str) -> Version | None:
    try:
        return Version(version(name))
    except PackageNotFoundError:
        return None


def _requirements_of(extra: str) -> Iterator[Requirement]:
    """Requirements of an extra alone."""
    for line in requires("llmctl") or []:
        requirement = Requirement(line)
        marker = requirement.marker
        if marker and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""}):
            yield requirement

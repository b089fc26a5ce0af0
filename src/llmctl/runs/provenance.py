"""Record where a result comes from: command, versions of the stack, commit."""

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from llmctl import __version__

RECORDED = (
    "torch",
    "transformers",
    "tokenizers",
    "datasets",
    "accelerate",
    "peft",
    "trl",
    "bitsandbytes",
    "numpy",
)


def origin() -> dict[str, Any]:
    """Return command, versions and commit for a manifest."""
    return {"command": ["llmctl", *sys.argv[1:]], "versions": versions(), "git": git()}


def versions() -> dict[str, str]:
    """Return the versions of llmctl, Python and the installed packages of the stack."""
    installed = {"llmctl": __version__, "python": platform.python_version()}
    for package in RECORDED:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return installed


def git() -> dict[str, Any] | None:
    """Return the commit of the working directory, and whether it has changes; None without git."""
    try:
        commit, changes = (
            subprocess.run(["git", *args], capture_output=True, text=True, check=True, timeout=5)
            for args in (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.stdout.strip(), "dirty": bool(changes.stdout.strip())}

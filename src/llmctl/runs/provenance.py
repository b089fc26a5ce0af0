"""Where a result comes from: versions of the stack, and the commit it was made at."""

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
    """The command, the versions and the commit, as a manifest has them."""
    return {"command": ["llmctl", *sys.argv[1:]], "versions": versions(), "git": git()}


def versions() -> dict[str, str]:
    """Versions of llmctl, of Python and of the stack."""
    found = {"llmctl": __version__, "python": platform.python_version()}
    for package in RECORDED:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def git() -> dict[str, Any] | None:
    """Commit of the directory the command runs in, and whether it has changes."""
    try:
        commit, changes = (
            subprocess.run(["git", *args], capture_output=True, text=True, check=True, timeout=5)
            for args in (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.stdout.strip(), "dirty": bool(changes.stdout.strip())}

"""`llmctl doctor`: what is here and what is amiss, each with its fix, on stdout."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from llmctl.checkup.device import check_devices
from llmctl.checkup.finding import Finding
from llmctl.checkup.machine import check_disks
from llmctl.checkup.network import check_hub
from llmctl.checkup.stack import check_extras, check_packages, check_python
from llmctl.config.commands import DoctorConfig
from llmctl.redact import redact
from llmctl.runs.provenance import versions

COLORS = {"ok": "\x1b[32m", "warning": "\x1b[33m", "failure": "\x1b[31m"}
PLAIN = "\x1b[0m"


def run(config: DoctorConfig) -> dict[str, Any] | None:
    """Print each finding as it is made; with --json they are the result.

    Raises:
        UserError: at least one is a failure; with the exit code of the first.
    """
    found = []
    for finding in _findings():
        shown = replace(finding, text=redact(finding.text))
        found.append(shown)
        if not config.as_json:
            _print(shown)
    states = [finding.state for finding in found]
    worst = next(state for state in ("failure", "warning", "ok") if state in states)
    checks = [{"name": f.name, "state": f.state, "text": f.text, "fix": f.fix} for f in found]
    result = {"stage": "doctor", "status": worst, "versions": versions(), "checks": checks}
    if failed := [finding for finding in found if finding.state == "failure"]:
        names = ", ".join(finding.name for finding in failed)
        error = failed[0].error(f"doctor found what must be mended: {names}", hint=failed[0].fix)
        error.report = result
        raise error
    return result if config.as_json else None


def _findings() -> Iterator[Finding]:
    yield check_python()
    yield from check_packages()
    yield from check_extras()
    yield from check_devices()
    yield from check_disks()
    yield from check_hub()


def _print(finding: Finding) -> None:
    """One line, and one with the fix."""
    colored = sys.stdout.isatty()
    state = finding.state.ljust(7)
    shown = f"{COLORS[finding.state]}{state}{PLAIN}" if colored else state
    print(f"{shown}  {finding.name:<12}  {finding.text}", flush=True)
    if finding.fix is not None:
        print(f"{' ' * 23}fix: {finding.fix}", flush=True)

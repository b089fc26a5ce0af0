"""`llmctl doctor`: the state of machine and packages, each problem with its fix, on stdout."""

import sys
from dataclasses import replace
from itertools import chain
from typing import Any

from llmctl.checkup import CheckResult
from llmctl.checkup.device import check_devices
from llmctl.checkup.machine import check_disks
from llmctl.checkup.network import check_hub
from llmctl.checkup.packages import check_extras, check_packages, check_python
from llmctl.config.commands.doctor import DoctorConfig
from llmctl.redact import redact
from llmctl.runs.provenance import versions

COLORS = {"ok": "\x1b[32m", "warning": "\x1b[33m", "failure": "\x1b[31m"}
PLAIN = "\x1b[0m"


def run(config: DoctorConfig) -> dict[str, Any] | None:
    """Print each check as it is done; with --json they are the result.

    Raises:
        UserError: at least one is a failure; with the exit code of the first.
    """
    results = []
    packages = chain([check_python()], check_packages(), check_extras())
    for check in chain(packages, check_devices(), check_disks(), check_hub()):
        shown = replace(check, text=redact(check.text))
        results.append(shown)
        if not config.as_json:
            _print(shown)
    states = [check.state for check in results]
    worst = next(state for state in ("failure", "warning", "ok") if state in states)
    checks = [{"name": f.name, "state": f.state, "text": f.text, "fix": f.fix} for f in results]
    result = {"stage": "doctor", "status": worst, "versions": versions(), "checks": checks}
    if failed := [check for check in results if check.state == "failure"]:
        names = ", ".join(check.name for check in failed)
        error = failed[0].error(f"doctor found what must be mended: {names}", hint=failed[0].fix)
        error.report = result
        raise error
    return result if config.as_json else None


def _print(check: CheckResult) -> None:
    """One line, and one with the fix."""
    colored = sys.stdout.isatty()
    state = check.state.ljust(7)
    shown = f"{COLORS[check.state]}{state}{PLAIN}" if colored else state
    print(f"{shown}  {check.name:<12}  {check.text}", flush=True)
    if check.fix is not None:
        print(f"{' ' * 23}fix: {check.fix}", flush=True)

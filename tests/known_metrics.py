"""Whether the table of metrics has every name that a command writes."""

from contextlib import contextmanager
from unittest.mock import patch

from llmctl import metrics
from llmctl.pipeline.gate_checks import flatten
from llmctl.runs.directory import METRICS, Run


def unknown(row, command, where):
    """Names of numbers and intervals that the table does not have for a command."""
    names = [name for name, _ in (*flatten(row), *metrics.figures(row))]
    found = {name: metrics.find(name) for name in names}
    return sorted(n for n, m in found.items() if m is None or command not in getattr(m, where))


@contextmanager
def known_metrics():
    """Fail a command as soon as it logs or records a number of a name that is not in the table."""
    log, record = Run.log, Run.record

    def checked_log(run, row, name=METRICS):
        if name == METRICS and run.stage != "evaluate":
            assert not unknown(row, run.stage, "logged"), unknown(row, run.stage, "logged")
        log(run, row, name)

    def checked_record(run, **facts):
        for given, command in ((facts.get("result"), run.stage), (facts.get("audit"), "audit")):
            missing = unknown(given or {}, command, "result")
            assert not missing, f"{command}: not in metrics.py: {missing}"
        record(run, **facts)

    with patch.object(Run, "log", checked_log), patch.object(Run, "record", checked_record):
        yield

"""The page that a life cycle ends with, where `llmctl report` is there to write it."""

import contextlib
import io
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from llmctl.config import stages

STAGE = "llmctl.stages.report"


def write_page(out: Path) -> str | None:
    """Write report.html on all runs of a directory; its path, None where nothing can write it."""
    if find_spec(STAGE) is None:
        return None
    page = out / "report.html"
    config = vars(stages)["ReportConfig"](runs=[out], out=page)
    with contextlib.redirect_stdout(io.StringIO()):
        import_module(STAGE).run(config)
    return str(page)

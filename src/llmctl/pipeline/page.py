"""The page that a life cycle ends with: what `llmctl report` writes of its runs."""

import contextlib
import io
from pathlib import Path

from llmctl.config.stages import ReportConfig
from llmctl.stages import report


def write_page(out: Path) -> str:
    """Write report.html on all runs of a directory; its path.

    Raises:
        OutputError: a file of that name is there, and no report.
    """
    page = out / "report.html"
    with contextlib.redirect_stdout(io.StringIO()):
        report.run(ReportConfig(runs=[out], out=page))
    return str(page)

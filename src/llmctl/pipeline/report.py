"""The page that a life cycle ends with: what `llmctl report` writes of its runs."""

import contextlib
import io
from pathlib import Path

from llmctl.commands import report
from llmctl.config.commands import ReportConfig
from llmctl.files import check_out

PAGE = "report.html"


def require_page(out: Path) -> None:
    """Refuse a directory where the page cannot be written.

    Raises:
        OutputError: a file of that name is there, and no report.
    """
    page = out / PAGE
    if page.exists():
        check_out(page, overwrite=report.is_ours(page))


def write_page(out: Path) -> str:
    """Write report.html on all runs of a directory; its path."""
    page = out / PAGE
    with contextlib.redirect_stdout(io.StringIO()):
        report.run(ReportConfig(runs=[out], out=page))
    return str(page)

"""Config of `report`."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import model_validator

from llmctl.config.base import Also, Argument, Config, Flag
from llmctl.config.sections import Control, Reporting


class ReportConfig(Config, Reporting):
    """Write a page on runs: curves, figures, samples, how to repeat them."""

    runs: Annotated[list[Path], Argument("RUN...")] = []
    """Runs, or folders of runs; several are laid side by side."""

    out: Annotated[Path | None, Flag("--out", "-o"), Also("output", "output-file"), Control] = None
    """File to write; by default report.html, and Markdown goes to stdout."""

    format: Literal["html", "md"] | None = None
    """html: one file that needs nothing else. md: a summary for CI. By default what `out` ends
    with, else html."""

    title: str | None = None
    """Heading; by default the name of the run or the folder."""

    overwrite: Annotated[bool, Control] = False
    """Replace the file even where it is no report of llmctl's."""

    @property
    def kind(self) -> Literal["html", "md"]:
        """The format that is meant."""
        is_md = self.out is not None and self.out.suffix == ".md"
        return self.format or ("md" if is_md else "html")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.runs:
            raise ValueError("RUN is required: a run, or a folder of runs")
        return self

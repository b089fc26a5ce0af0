"""`llmctl report`: runs in, a page or a summary out."""

from pathlib import Path
from typing import Any

from llmctl.config.commands.report import ReportConfig
from llmctl.console import log
from llmctl.files import check_out, replace_file, writing
from llmctl.redact import redact
from llmctl.reporting.html import GENERATOR, page
from llmctl.reporting.markdown import summary
from llmctl.reporting.records import RunRecord, read_extras, read_records, unique_names

PAGE = Path("report.html")
HEAD_BYTES = 4000
"""First bytes of a page, which name its generator."""


def run(config: ReportConfig) -> dict[str, Any] | None:
    """Write the page; Markdown without a file is the result itself."""
    out = config.out or (PAGE if config.kind == "html" else None)
    check_out(out, overwrite=config.overwrite or is_ours(out))
    records, notes = read_records(config.runs)
    title = redact(config.title or _title(config.runs))
    extras = read_extras(config.runs)
    if config.kind == "html":
        text = page(records, notes, extras, title)
    else:
        text = summary(records, notes, extras, title)
    if out is not None:
        with writing(out):
            replace_file(out, text.encode())
        log.info("report on %s", ", ".join(record.name for record in records))
    elif not config.as_json:
        print(text, end="")
        return None
    result = {"stage": "report", "out": None if out is None else str(out), "format": config.kind}
    return {**result, "runs": [_as_json(record) for record in records]} | (
        {} if out is not None else {"text": text}
    )


def _title(named: list[Path]) -> str:
    if len(named) == 1:
        return named[0].absolute().name
    names = list(unique_names(named))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def is_ours(out: Path | None) -> bool:
    """Whether the file is an earlier report, which may be replaced."""
    if out is None or not out.is_file():
        return False
    with out.open("rb") as file:
        return f'<meta name="generator" content="{GENERATOR}">'.encode() in file.read(HEAD_BYTES)


def _as_json(record: RunRecord) -> dict[str, Any]:
    return {
        "path": str(record.path),
        "stage": record.stage,
        "status": record.state,
        "exit_code": record.status.get("exit_code"),
        "seconds": record.seconds,
        "energy": record.manifest.get("energy"),
        "result": record.manifest.get("result"),
    }

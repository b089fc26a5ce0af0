"""Write one HTML file that needs nothing else: no network, no other file, no script to be read.

In: records. Out: the text of the page.
"""

import base64
import hashlib
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from llmctl import __version__, numbers
from llmctl.config.commands import config_of
from llmctl.reporting import origins, tables
from llmctl.reporting.calibration import calibration_chart
from llmctl.reporting.curves import panels
from llmctl.reporting.draw import HEIGHT, LEFT, RIGHT, WIDTH, Chart, draw
from llmctl.reporting.graph import BOX, graphs
from llmctl.reporting.records import FolderExtras, RunRecord
from llmctl.reporting.tables import KeyFigure, Table
from llmctl.reporting.texts import SampleGroup, generated_samples, samples_of_all

WEB = Path(__file__).with_name("web")
GENERATOR = "llmctl report"
"""Named in the page, so that the next report may replace it."""


@dataclass(frozen=True)
class RunSection:
    """One run on the page."""

    record: RunRecord
    color: int
    step: str
    command: tuple[str, ...]
    figures: tuple[KeyFigure, ...]
    calibration: dict[str, Any] | None
    tables: tuple[Table, ...]


@dataclass(frozen=True)
class StageSection:
    """The runs of one stage."""

    name: str
    description: str
    runs: tuple[RunSection, ...]
    compared: Table | None
    """Key figures of several runs side by side."""
    samples: tuple[SampleGroup, ...]
    audits: tuple[tuple[str, Table], ...]
    """Run's name and table; the name is empty where all runs have the same."""
    charts: tuple[Chart, ...]
    more_charts: tuple[Chart, ...]
    folded: tuple[Table, ...]


def page(
    records: Sequence[RunRecord],
    notes: Sequence[str],
    extras: FolderExtras,
    title: str,
) -> str:
    """Return the page on runs, with the extras of their folders."""
    shown = stage_sections(records)
    recipe, out = (shlex.quote(f"{records[0].path}{end}") for end in ("/recipe.yaml", "-again"))
    style, script = ((WEB / name).read_text("utf-8") for name in ("report.css", "report.js"))
    drawn = [chart for stage in shown for chart in (*stage.charts, *stage.more_charts)]
    data = {"left": LEFT, "width": WIDTH - LEFT - RIGHT, "charts": [chart.data for chart in drawn]}
    curves = json.dumps(data, separators=(",", ":"), allow_nan=False)
    environment = Environment(
        loader=FileSystemLoader(WEB),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(
        title=title,
        generator=GENERATOR,
        version=__version__,
        lead=lead(records, extras.gates),
        notes=notes,
        stages=shown,
        graphs=graphs(records),
        box=BOX,
        frame=(WIDTH, HEIGHT, LEFT, RIGHT),
        time_of=origins.time_of,
        energy_of=origins.energy_of,
        generated=[generated_samples(name, rows) for name, rows in extras.generated],
        gates=tables.gates_table(extras.gates),
        repeats=repeats(shown),
        again=("llmctl", records[0].stage, f"-c {recipe}", f"-o {out}"),
        inputs=origins.inputs_table(records),
        machine=origins.machine_table(records),
        has_noise=any(line.smooth for chart in drawn for line in chart.lines),
        style=Markup(style),
        script=Markup(script),
        data=Markup(curves.replace("<", r"\u003c")),  # JSON that cannot end its element
        policy=policy(style, script),
    )


def stage_sections(records: Sequence[RunRecord]) -> list[StageSection]:
    """Group runs by stage, in the order of their first runs."""
    groups: dict[str, list[RunRecord]] = {}
    for record in records:
        groups.setdefault(record.stage, []).append(record)
    return [_stage(name, group) for name, group in groups.items()]


def lead(records: Sequence[RunRecord], gates: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Sum the page up in a sentence, and say how many gates failed."""
    failed = sum(gate.get("holds") is not True for _, gate in gates)
    broken = f" Of {numbers.counted(len(gates), 'gate')}, {failed} did not hold." if failed else ""
    states = [record.state for record in records]
    time = sum(record.seconds or 0 for record in records)
    spent = f" in {numbers.seconds(time)}" if time else ""
    if len(records) == 1:
        return f"One run of llmctl {records[0].stage}, {states[0]}{spent}.{broken}"
    how = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states))
    ended = "all completed" if set(states) == {"completed"} else how
    return f"{len(records)} runs, {ended}{spent}.{broken}"


def repeats(shown: Sequence[StageSection]) -> list[tuple[tuple[str, ...], list[str]]]:
    """Return every command once, in pieces, with the paths of the runs that it made."""
    paths: dict[tuple[str, ...], list[str]] = {}
    for run in (run for stage in shown for run in stage.runs):
        paths.setdefault(run.command, []).append(str(run.record.path))
    return list(paths.items())


def policy(style: str, script: str) -> str:
    """Return the content security policy that lets in this style and script only."""

    def mark(text: str) -> str:
        return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    return (
        f"default-src 'none'; style-src 'sha256-{mark(style)}'; "
        f"script-src 'sha256-{mark(script)}'; img-src data:; base-uri 'none'; form-action 'none'"
    )


def _stage(name: str, records: Sequence[RunRecord]) -> StageSection:
    config = config_of(name)
    first, others = panels(records)
    settings, plan = origins.settings_table(records), origins.plan_table(records)
    folded = (tables.figures_table(records), settings, plan)
    return StageSection(
        name=name,
        description=(config.__doc__ or "").split("\n")[0] if config else "",
        runs=tuple(_run(number, record) for number, record in enumerate(records)),
        compared=tables.compared_table(records) if len(records) > 1 else None,
        samples=tuple(samples_of_all(records)),
        audits=tuple(origins.distinct_audits(records)),
        charts=tuple(draw(panel) for panel in first),
        more_charts=tuple(draw(panel) for panel in others),
        folded=tuple(table for table in folded if table is not None and table.rows),
    )


def _run(number: int, record: RunRecord) -> RunSection:
    step, most = record.summary.step, record.summary.max_steps
    return RunSection(
        record,
        color=number % 6 + 1,
        step="" if step is None else f"{step:,} of {most:,}" if most else f"{step:,}",
        command=tuple(_words(record)),
        figures=tuple(tables.key_figures(record)),
        calibration=calibration_chart(record),
        tables=tuple(tables.nested_tables(record)),
    )


def _words(record: RunRecord) -> Iterator[str]:
    """Yield the command in pieces not to be broken by a line: a flag with its value."""
    words = map(str, record.manifest.get("command") or [])
    piece: list[str] = []
    for word in words:
        if piece and (word.startswith("-") or not piece[0].startswith("-") or len(piece) == 2):
            yield shlex.join(piece)
            piece = []
        piece.append(word)
    if piece:
        yield shlex.join(piece)

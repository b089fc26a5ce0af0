"""One HTML file that needs nothing else: no network, no other file, and no script to be read.

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
from llmctl.config import commands
from llmctl.reporting import origins, tables
from llmctl.reporting.calibration import Judgement, judgement
from llmctl.reporting.curves import panels
from llmctl.reporting.draw import HEIGHT, LEFT, RIGHT, WIDTH, Drawing, draw
from llmctl.reporting.graph import BOX, graphs
from llmctl.reporting.records import Beside, Record
from llmctl.reporting.tables import Figure, Table
from llmctl.reporting.texts import Samples, generated_samples, samples_of_all

WEB = Path(__file__).with_name("web")
GENERATOR = "llmctl report"
"""Named in the page, so that the next report may replace it."""


@dataclass(frozen=True)
class Run:
    """What the page says of one run."""

    name: str
    stage: str
    state: str
    color: int
    step: str
    time: str
    energy: str
    error: str
    exit_code: str
    resume: str
    command: tuple[str, ...]
    path: str
    notes: tuple[str, ...]
    figures: tuple[Figure, ...]
    judged: Judgement | None
    tables: tuple[Table, ...]
    folds_tables: bool


@dataclass(frozen=True)
class Stage:
    """The runs of one stage."""

    name: str
    about: str
    runs: tuple[Run, ...]
    compared: Table | None
    """Key figures of several runs side by side."""
    samples: tuple[Samples, ...]
    audits: tuple[tuple[str, Table], ...]
    """Each with the name of its run, empty where all runs have the same."""
    charts: tuple[Drawing, ...]
    more_charts: tuple[Drawing, ...]
    folded: tuple[Table, ...]


def page(
    records: Sequence[Record],
    notes: Sequence[str],
    beside: Beside,
    title: str,
) -> str:
    """The page on runs, with what lies beside them."""
    shown = stages_of(records)
    style, script = ((WEB / name).read_text("utf-8") for name in ("report.css", "report.js"))
    drawn = [chart for stage in shown for chart in (*stage.charts, *stage.more_charts)]
    data = {"left": LEFT, "width": WIDTH - LEFT - RIGHT, "charts": [one.data for one in drawn]}
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
        lede=lede(records, beside.gates),
        notes=notes,
        stages=shown,
        graphs=graphs(records),
        box=BOX,
        frame=(WIDTH, HEIGHT, LEFT, RIGHT),
        generated=[generated_samples(name, rows) for name, rows in beside.generated],
        gates=tables.gates_table(beside.gates),
        repeats=repeats(shown),
        again=again(records[0]),
        inputs=origins.inputs_table(records),
        machine=origins.machine_table(records),
        has_noise=any(line.smooth for chart in drawn for line in chart.lines),
        style=Markup(style),
        script=Markup(script),
        data=Markup(_as_script(data)),
        policy=policy(style, script),
    )


def stages_of(records: Sequence[Record]) -> list[Stage]:
    """The stages, in the order of their first runs."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.stage, []).append(record)
    return [_stage(name, found) for name, found in groups.items()]


def lede(records: Sequence[Record], gates: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """What the page is on, in one sentence, and whether what had to hold does."""
    states = [record.state for record in records]
    time = sum(record.seconds or 0 for record in records)
    spent = f" in {numbers.seconds(time)}" if time else ""
    if len(records) == 1:
        return f"One run of llmctl {records[0].stage}, {states[0]}{spent}.{_of_gates(gates)}"
    how = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states))
    all_done = states.count("completed") == len(states)
    ended = "all completed" if all_done else how
    return f"{len(records)} runs, {ended}{spent}.{_of_gates(gates)}"


def _of_gates(gates: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """How many of the gates fail, as a sentence; nothing where none does."""
    failed = sum(gate.get("holds") is not True for _, gate in gates)
    return f" Of {len(gates)} gates, {failed} did not hold." if failed else ""


def repeats(shown: Sequence[Stage]) -> list[tuple[tuple[str, ...], list[str]]]:
    """Every command once, in pieces, with the paths of the runs that it made."""
    made: dict[tuple[str, ...], list[str]] = {}
    for run in (run for stage in shown for run in stage.runs):
        made.setdefault(run.command, []).append(run.path)
    return list(made.items())


def policy(style: str, script: str) -> str:
    """Let in this style and this script, and nothing else from anywhere."""

    def mark(text: str) -> str:
        return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    return (
        f"default-src 'none'; style-src 'sha256-{mark(style)}'; "
        f"script-src 'sha256-{mark(script)}'; img-src data:; base-uri 'none'; form-action 'none'"
    )


def _as_script(data: dict[str, Any]) -> str:
    """JSON that cannot end the element that it stands in."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _stage(name: str, records: Sequence[Record]) -> Stage:
    first, others = panels(records)
    folded = [tables.figures_table(records), origins.settings_table(records)]
    folded.append(origins.chosen_table(records))
    return Stage(
        name=name,
        about=about(name),
        runs=tuple(_run(number, record) for number, record in enumerate(records)),
        compared=tables.compared_table(records) if len(records) > 1 else None,
        samples=tuple(samples_of_all(records)),
        audits=tuple(origins.distinct_audits(records)),
        charts=tuple(draw(panel) for panel in first),
        more_charts=tuple(draw(panel) for panel in others),
        folded=tuple(table for table in folded if table is not None and table.rows),
    )


def about(stage: str) -> str:
    """What a stage does, as its config says it."""
    config = vars(commands).get(f"{stage.capitalize()}Config")
    return ((config.__doc__ if config else None) or "").split("\n")[0]


def _run(number: int, record: Record) -> Run:
    status, step = record.status, record.summary.step
    most = f" of {record.summary.max_steps:,}" if record.summary.max_steps else ""
    return Run(
        name=record.name,
        stage=record.stage,
        state=record.state,
        color=number % 6 + 1,
        step="" if step is None else f"{step:,}{most}",
        time=origins.time_of(record),
        energy=origins.energy_of(record),
        error=str(status.get("error") or ""),
        exit_code="" if status.get("exit_code") is None else str(status["exit_code"]),
        resume=record.summary.resume or "",
        command=tuple(_words(record)),
        path=str(record.path),
        notes=record.notes,
        figures=tuple(tables.key_figures(record)),
        judged=judgement(record),
        tables=tuple(tables.nested_tables(record)),
        folds_tables=record.stage == "tokenize",
    )


def again(record: Record) -> tuple[str, ...]:
    """The command that makes a run again elsewhere, from its resolved recipe, in pieces."""
    recipe, out = (shlex.quote(f"{record.path}{end}") for end in ("/recipe.yaml", "-again"))
    return ("llmctl", record.stage, f"-c {recipe}", f"-o {out}")


def _words(record: Record) -> Iterator[str]:
    """The command in pieces that a line should not end in: a flag with its value."""
    words = map(str, record.manifest.get("command") or [])
    piece: list[str] = []
    for word in words:
        if piece and (word.startswith("-") or not piece[0].startswith("-") or len(piece) == 2):
            yield shlex.join(piece)
            piece = []
        piece.append(word)
    if piece:
        yield shlex.join(piece)

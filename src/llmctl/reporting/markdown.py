"""Write a summary in GitHub's Markdown, for a CI job's page or a pull request.

In: records. Out: its text, in which the runs' texts are escaped: no heading, link or HTML.
"""

import re
import shlex
from collections.abc import Iterable, Iterator, Sequence

from llmctl.reporting import origins, tables
from llmctl.reporting.graph import edges
from llmctl.reporting.html import lead, stage_sections
from llmctl.reporting.records import FolderExtras, RunRecord
from llmctl.reporting.tables import Table
from llmctl.reporting.texts import SampleGroup

_SPECIAL = re.compile(r"([\\`*_{}\[\]()#+!|~<>&@-])")
MARKS = {"completed": "✅", "running": "⏳", "preempted": "⏸️", "killed": "⏸️"}
MOST_SAMPLES = 3


def summary(
    records: Sequence[RunRecord], notes: Sequence[str], extras: FolderExtras, title: str
) -> str:
    """Return the text of the summary."""
    parts = [f"# {escaped(title)}", escaped(lead(records, extras.gates)), _overview(records)]
    parts += [f"> {escaped(note)}" for note in notes]
    gates = tables.gates_table(extras.gates)
    parts += [f"**{gates.title}**", _table(gates)] if gates else []
    parts += _flow(records)
    for stage in stage_sections(records):
        parts.append(f"## {escaped(stage.name)}")
        mine = [run.record for run in stage.runs]
        for run in stage.runs:
            name, error = escaped(run.record.name), run.record.status.get("error")
            parts += [f"**{name}**: {escaped(str(error))}"] if error else []
            parts += [f"> {name}: {escaped(note)}" for note in run.record.notes]
        parts.append(_table(tables.figures_table(mine)))
        if (settings := origins.settings_table(mine)) is not None:
            parts.append(_folded(settings.title, _table(settings)))
        for run in stage.runs:
            parts += [_folded(table.title, _table(table)) for table in run.tables]
        for name, table in stage.audits:
            parts.append(_folded(f"{table.title} {name}".strip(), _table(table)))
        parts += [_folded(group.title, _samples(group)) for group in stage.samples]
    differing, same = origins.machine_table(records)
    parts += [_table(differing)] if differing else []
    listed = ", ".join(f"{key} {value}" for key, value in same)
    parts.append(_folded("Machine and versions", escaped(listed)))
    parts.append(_folded("Commands", _commands(records)))
    return "\n\n".join(part for part in parts if part) + "\n"


def escaped(text: str) -> str:
    """Escape a text that Markdown is to show as it is, on one line."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split())).replace(r"\-", "-")


def _overview(records: Sequence[RunRecord]) -> str:
    rows = []
    for record in records:
        key = [f"{figure.label} {figure.value}" for figure in tables.key_figures(record)[:2]]
        state = f"{MARKS.get(record.state, '❌')} {record.state}"
        took = (origins.time_of(record), origins.energy_of(record))
        rows.append((record.stage, record.name, state, ", ".join(key), *took))
    heads = ("stage", "run", "status", "figures", "time", "energy")
    return _table(Table("", heads, tuple(rows), is_text=True))


def _flow(records: Sequence[RunRecord]) -> Iterator[str]:
    """Yield which run fed which as a Mermaid diagram, which GitHub draws."""
    nodes, pairs = edges(records)
    if pairs:
        lines = [
            f'  n{i}["{_label(stage)}: {_label(name)}"]' for i, (stage, name) in enumerate(nodes)
        ]
        lines += [f"  n{parent} --> n{child}" for parent, child in pairs]
        yield "\n".join(["```mermaid", "flowchart LR", *lines, "```"])


def _label(text: str) -> str:
    return re.sub(r"[^\w./ -]", "?", " ".join(text.split()))


def _table(table: Table) -> str:
    width = len(table.head)
    aligned = ["---"] * width if table.is_text else ["---", *["---:"] * (width - 1)]
    rows = [[escaped(cell) for cell in row] for row in (table.head, *table.rows)]
    lines: Iterable[list[str]] = [rows[0], aligned, *rows[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _folded(title: str, text: str) -> str:
    return f"<details><summary>{escaped(title)}</summary>\n\n{text}\n\n</details>"


def _samples(samples: SampleGroup) -> str:
    rows = [
        (sample.prompt, f"{text.label} {text.score}".strip(), text.text)
        for sample in samples.rows[:MOST_SAMPLES]
        for text in sample.texts
    ]
    return _table(Table(samples.title, ("prompt", "", "text"), tuple(rows), is_text=True))


def _commands(records: Sequence[RunRecord]) -> str:
    words = ([str(word) for word in record.manifest.get("command") or []] for record in records)
    lines = list(dict.fromkeys(shlex.join(line) for line in words))
    fence = "`" * max(
        3, 1 + max((len(run) for run in re.findall("`+", "\n".join(lines))), default=0)
    )
    return f"{fence}sh\n" + "\n".join(lines) + f"\n{fence}"

"""Tables of runs' results: the key figures, and results of any shape.

In: records. Out: tables of texts, which a template escapes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmctl import metrics, numbers
from llmctl.reporting.records import RunRecord, as_mapping

SIGNS = {">=": "\N{GREATER-THAN OR EQUAL TO}", "<=": "\N{LESS-THAN OR EQUAL TO}"}
MOST_KEY_FIGURES = 5
MOST_ROWS = 60
LONG = 1200
"""Most characters of a text that are shown."""


@dataclass(frozen=True)
class Table:
    """Rows of texts; the first cell of each is its heading."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    is_text: bool = False
    """Whether its cells are texts, not numbers."""


@dataclass(frozen=True)
class KeyFigure:
    """One metric of a result."""

    label: str
    value: str
    note: str = ""


def key_figures(record: RunRecord) -> list[KeyFigure]:
    """Return the few metrics that a stage is judged by."""
    values = dict(metrics.figures(record.result))
    names = [m.name for m in metrics.METRICS if record.stage in m.key and m.name in values]
    if record.stage != "reward":  # which is judged by how often it is right
        names.sort(key=lambda name: name != "val_loss")
    if not names:
        names = [n for n in values if n not in ("mfu", "step", "best_step", "memory_bytes")]
    return [
        KeyFigure(metrics.label(name), metrics.value(name, values[name]), _interval(name, values))
        for name in names[:MOST_KEY_FIGURES]
    ]


def figures_table(records: Sequence[RunRecord]) -> Table:
    """Tabulate all metrics of the results of one stage's runs, a column each."""
    results = [dict(metrics.figures(record.result)) for record in records]
    keys = dict.fromkeys(key for result in results for key in result)
    rows = [
        (metrics.label(key), *(metrics.value(key, result.get(key)) for result in results))
        for key in keys
    ]
    return Table("All figures", ("", *(record.name for record in records)), tuple(rows))


def compared_table(records: Sequence[RunRecord]) -> Table:
    """Tabulate the key figures of several runs of one stage, a column each."""
    columns = [{figure.label: figure for figure in key_figures(record)} for record in records]
    labels = dict.fromkeys(label for column in columns for label in column)
    rows = [
        (label, *(c[label].value if label in c else numbers.MISSING for c in columns))
        for label in labels
    ]
    return Table("Key figures", ("", *(record.name for record in records)), tuple(rows))


def nested_tables(record: RunRecord) -> Iterator[Table]:
    """Tabulate the objects and lists in a result and in report.json, whatever they are called."""
    known = {"audit", "reliability", "samples"}
    if record.stage == "reward":
        known |= {"val_chosen", "val_rejected"}  # they are drawn
    yield from _before_after(record.result)
    if isinstance(record.result.get("compare"), dict):
        known |= {"compare", "differences"}
        yield _comparison(record.result)
    for source in (record.result, record.report):
        groups = {k: v for k, v in source.items() if isinstance(v, dict) and v and k not in known}
        yield from _matrices(groups)
        for key, value in source.items():
            if isinstance(value, list) and value and key not in known:
                yield from _list_table(key, value)
    extra = metrics.figures({k: v for k, v in record.report.items() if k not in record.result})
    if extra:
        rows = tuple((metrics.label(k), metrics.value(k, v)) for k, v in extra)
        yield Table("Report", ("", "value"), rows)


def _before_after(result: Mapping[str, Any]) -> Iterator[Table]:
    """Tabulate metrics that a result has before and after, as that of `quantize`."""
    names = [k.removesuffix("_before") for k in result if k.endswith("_before")]
    rows = []
    for name in (name for name in names if f"{name}_after" in result):
        ends = result[f"{name}_before"], result[f"{name}_after"]
        both = all(isinstance(end, int | float) and end for end in ends)
        change = f"{ends[1] / ends[0]:.3g} \N{MULTIPLICATION SIGN}" if both else ""
        rows.append((metrics.label(name), *(metrics.value(name, end) for end in ends), change))
    if rows:
        yield Table("Before and after", ("", "before", "after", "change"), tuple(rows))


def _comparison(result: Mapping[str, Any]) -> Table:
    """Tabulate metrics of two models on the same data, with the interval of their difference."""
    other, differences = as_mapping(result["compare"]), as_mapping(result.get("differences"))
    rows = []
    for key, value in metrics.figures(result):
        if key in other:
            entry = as_mapping(differences.get(key))
            ends = [entry.get(end) for end in ("low", "high")]
            interval = "" if None in ends else " to ".join(f"{end:+.3g}" for end in ends)
            difference = f"{entry['difference']:+.3g}" if "difference" in entry else ""
            values = (metrics.value(key, value), metrics.value(key, other[key]))
            cells = (*values, difference, interval)
            rows.append((metrics.label(key), *cells))
    heads = (
        "",
        format_setting(result.get("model")),
        format_setting(other.get("model")),
        "difference",
        "95 %",
    )
    return Table("Two models on the same data", heads, tuple(rows))


def gates_table(gates: Sequence[tuple[str, Mapping[str, Any]]]) -> Table | None:
    """Tabulate the gates of `llmctl run`, and whether they hold."""
    rows = tuple(
        (
            stage,
            f"{metrics.label(str(gate.get('figure')))} {SIGNS.get(sign, sign)} "
            f"{metrics.value(str(gate.get('figure')), gate.get('bound'))}",
            metrics.value(str(gate.get("figure")), gate.get("value")),
            "✓ holds" if gate.get("holds") is True else "✗ does not hold",
        )
        for stage, gate in gates
        for sign in [str(gate.get("sign"))]
    )
    heads = ("stage", "must hold", "found", "")
    return Table("What had to hold", heads, rows, is_text=True) if rows else None


def _matrices(groups: Mapping[str, Mapping[str, Any]]) -> Iterator[Table]:
    """Tabulate mappings, side by side where they have the same keys, as before and after do."""
    left = dict(groups)
    while left:
        name, first = next(iter(left.items()))
        alike = [k for k, v in left.items() if v.keys() & first.keys() and k != name]
        names = [name, *alike] if not any(isinstance(v, dict) for v in first.values()) else [name]
        columns = [left.pop(key) for key in names]
        if len(columns) == 1 and all(isinstance(v, dict) for v in first.values()):
            names, columns = list(first), [dict(v) for v in first.values()]
        keys = dict.fromkeys(key for column in columns for key in column)
        rows = [
            (metrics.label(key), *(_cell(key, column.get(key)) for column in columns))
            for key in keys
        ]
        title = metrics.label(name) if len(names) == 1 or first is not columns[0] else " and ".join(
            metrics.label(key).lower() for key in names).capitalize()  # fmt: skip
        heads = [metrics.label(key) for key in names] if len(names) > 1 else ["value"]
        yield Table(title, ("", *heads), tuple(rows[:MOST_ROWS]))


def _list_table(key: str, value: list[Any]) -> Iterator[Table]:
    rows = [row for row in value if isinstance(row, dict)][:MOST_ROWS]
    if rows:
        keys = list(dict.fromkeys(name for row in rows for name in row))
        cells = tuple(tuple(_cell(name, row.get(name)) for name in keys) for row in rows)
        is_text = any(isinstance(v, str) and len(v) > 40 for row in rows for v in row.values())
        yield Table(metrics.label(key), tuple(map(metrics.label, keys)), cells, is_text)
    elif not (len(value) == 2 and all(isinstance(end, int | float) for end in value)):
        cells = tuple((_cell(key, item),) for item in value[:MOST_ROWS])
        yield Table(metrics.label(key), (metrics.label(key),), cells, is_text=True)


def format_setting(value: Any) -> str:
    """Format a setting as a recipe would have it, on one line."""
    if value is None or value == [] or value == "":
        return numbers.MISSING
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return ", ".join(map(format_setting, value))
    if isinstance(value, dict):
        return ", ".join(f"{key}: {format_setting(item)}" for key, item in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def truncate(text: str) -> str:
    """Shorten a text to what a page needs."""
    return text if len(text) <= LONG else f"{text[:LONG]} […{len(text) - LONG:,} more characters]"


def _cell(key: str, value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {metrics.value(name, item)}" for name, item in value.items())
    if isinstance(value, list) and any(isinstance(item, str | dict | list) for item in value):
        return truncate(", ".join(map(str, value)))
    return truncate(metrics.value(key, value))


def _interval(name: str, values: Mapping[str, Any]) -> str:
    ends = values.get(f"{name}_interval") or [values.get(f"{name}_{e}") for e in ("low", "high")]
    if any(not isinstance(end, int | float) for end in ends):
        return ""
    return f"{metrics.value(name, list(ends))} (95{numbers.NARROW}%)"

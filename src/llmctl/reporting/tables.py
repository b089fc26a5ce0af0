"""Figures of runs as tables: the few that tell most, and results of any shape.

In: records. Out: tables of texts, which a template escapes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmctl import metrics, numbers
from llmctl.reporting.records import Record

SIGNS = {">=": "\N{GREATER-THAN OR EQUAL TO}", "<=": "\N{LESS-THAN OR EQUAL TO}"}
MOST_KEY_FIGURES = 5
MOST_ROWS = 60
LONG = 1200
"""Characters of a text that are shown."""


@dataclass(frozen=True)
class Table:
    """Rows of texts; the first cell of each is its heading."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    is_text: bool = False
    """Whether its cells are texts, not figures."""


@dataclass(frozen=True)
class Figure:
    """One number with its name."""

    label: str
    value: str
    note: str = ""


def key_figures(record: Record) -> list[Figure]:
    """The few figures that a stage is judged by."""
    found = dict(metrics.figures(record.result))
    names = [m.name for m in metrics.METRICS if record.stage in m.key and m.name in found]
    if not names:
        names = [n for n in found if n not in ("mfu", "step", "best_step", "memory_bytes")]
    return [
        Figure(metrics.label(name), metrics.value(name, found[name]), _interval(name, found))
        for name in names[:MOST_KEY_FIGURES]
    ]


def figures_table(records: Sequence[Record]) -> Table:
    """Every figure of the results of runs of one stage, a column each."""
    found = [dict(metrics.figures(record.result)) for record in records]
    keys = dict.fromkeys(key for one in found for key in one)
    rows = [
        (metrics.label(key), *(metrics.value(key, one.get(key)) for one in found)) for key in keys
    ]
    return Table("All figures", ("", *(record.name for record in records)), tuple(rows))


def compared_table(records: Sequence[Record]) -> Table:
    """The key figures of several runs of one stage, a column each."""
    columns = [{one.label: one for one in key_figures(record)} for record in records]
    labels = dict.fromkeys(label for column in columns for label in column)
    rows = [
        (label, *(c[label].value if label in c else numbers.MISSING for c in columns))
        for label in labels
    ]
    return Table("Key figures", ("", *(record.name for record in records)), tuple(rows))


def nested_tables(record: Record) -> Iterator[Table]:
    """What a result or report.json holds besides figures, whatever it is called."""
    known = {"audit", "reliability", "samples"}
    if record.stage == "reward":
        known |= {"val_chosen", "val_rejected"}  # they are drawn
    yield from _before_after(record.result)
    if isinstance(record.result.get("compare"), dict):
        known |= {"compare", "differences"}
        yield _beside_other(record.result)
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
    """Figures that are there twice, as `quantize` has them."""
    names = [k.removesuffix("_before") for k in result if k.endswith("_before")]
    rows = []
    for name in (name for name in names if f"{name}_after" in result):
        ends = result[f"{name}_before"], result[f"{name}_after"]
        both = all(isinstance(end, int | float) and end for end in ends)
        change = f"{ends[1] / ends[0]:.3g} \N{MULTIPLICATION SIGN}" if both else ""
        rows.append((metrics.label(name), *(metrics.value(name, end) for end in ends), change))
    if rows:
        yield Table("Before and after", ("", "before", "after", "change"), tuple(rows))


def _beside_other(result: Mapping[str, Any]) -> Table:
    """Figures of two models on the same data, with the interval of their difference."""
    other, apart = mapping(result["compare"]), mapping(result.get("differences"))
    rows = []
    for key, value in metrics.figures(result):
        if key in other:
            found = mapping(apart.get(key))
            ends = [found.get(end) for end in ("low", "high")]
            between = "" if None in ends else " to ".join(f"{end:+.3g}" for end in ends)
            said = f"{found['difference']:+.3g}" if "difference" in found else ""
            cells = (metrics.value(key, value), metrics.value(key, other[key]), said, between)
            rows.append((metrics.label(key), *cells))
    heads = ("", shown(result.get("model")), shown(other.get("model")), "difference", "95 %")
    return Table("Two models on the same data", heads, tuple(rows))


def gates_table(gates: Sequence[tuple[str, Mapping[str, Any]]]) -> Table | None:
    """What `llmctl run` was told must hold of its stages, and whether it does."""
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
    """Mappings beside each other where they hold the same keys, as before and after do."""
    left = dict(groups)
    while left:
        name, first = next(iter(left.items()))
        alike = [k for k, v in left.items() if v.keys() & first.keys() and k != name]
        names = [name, *alike] if not any(isinstance(v, dict) for v in first.values()) else [name]
        columns = [left.pop(one) for one in names]
        if len(columns) == 1 and all(isinstance(v, dict) for v in first.values()):
            names, columns = list(first), [dict(v) for v in first.values()]
        keys = dict.fromkeys(key for column in columns for key in column)
        rows = [
            (metrics.label(key), *(_cell(key, column.get(key)) for column in columns))
            for key in keys
        ]
        title = metrics.label(name) if len(names) == 1 or first is not columns[0] else " and ".join(
            metrics.label(one).lower() for one in names).capitalize()  # fmt: skip
        heads = [metrics.label(one) for one in names] if len(names) > 1 else ["value"]
        yield Table(title, ("", *heads), tuple(rows[:MOST_ROWS]))


def _list_table(key: str, value: list[Any]) -> Iterator[Table]:
    rows = [row for row in value if isinstance(row, dict)][:MOST_ROWS]
    if rows:
        keys = list(dict.fromkeys(name for row in rows for name in row))
        cells = tuple(tuple(_cell(name, row.get(name)) for name in keys) for row in rows)
        is_text = any(isinstance(v, str) and len(v) > 40 for row in rows for v in row.values())
        yield Table(metrics.label(key), tuple(map(metrics.label, keys)), cells, is_text)
    elif not (len(value) == 2 and all(isinstance(end, int | float) for end in value)):
        cells = tuple((_cell(key, one),) for one in value[:MOST_ROWS])
        yield Table(metrics.label(key), (metrics.label(key),), cells, is_text=True)


def shown(value: Any) -> str:
    """A setting as a recipe would have it, on one line."""
    if value is None or value == [] or value == "":
        return numbers.MISSING
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return ", ".join(map(shown, value))
    if isinstance(value, dict):
        return ", ".join(f"{key}: {shown(one)}" for key, one in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def cut(text: str) -> str:
    """A text, no more of it than a page needs."""
    return text if len(text) <= LONG else f"{text[:LONG]} […{len(text) - LONG:,} more characters]"


def _cell(key: str, value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {metrics.value(name, one)}" for name, one in value.items())
    if isinstance(value, list) and any(isinstance(one, str | dict | list) for one in value):
        return cut(", ".join(map(str, value)))
    return cut(metrics.value(key, value))


def _interval(name: str, found: Mapping[str, Any]) -> str:
    ends = found.get(f"{name}_interval") or [found.get(f"{name}_{end}") for end in ("low", "high")]
    if any(not isinstance(end, int | float) for end in ends):
        return ""
    return f"{metrics.value(name, list(ends))} (95{numbers.NARROW}%)"


def mapping(value: Any) -> dict[str, Any]:
    """The value where it is a mapping, else an empty one."""
    return value if isinstance(value, dict) else {}

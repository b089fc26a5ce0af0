"""Figures of runs as tables: key figures, results of any shape, settings, audits, versions.

In: records. Out: tables of texts, which a template escapes.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmctl import wording
from llmctl.config import stages
from llmctl.config.base import Config
from llmctl.reporting.runs import Record

KEY_FIGURES = {
    "tokenize": ("tokens", "vocab_size", "bytes_per_token", "vocab_used", "unknown_rate"),
    "pretrain": ("val_loss", "val_bits_per_byte", "val_perplexity", "parameters", "tokens"),
    "sft": ("val_loss", "val_accuracy", "val_token_accuracy", "trained_parameters", "tokens"),
    "reward": (
        "val_accuracy",
        "val_longer_wins",
        "val_calibration_error",
        "val_loss",
        "val_margin",
    ),
    "ppo": ("val_win_rate", "val_score", "val_reference_score", "val_kl", "val_length"),
    "dpo": ("val_accuracy", "val_loss", "val_margin", "trained_parameters", "tokens"),
}
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
    found = dict(wording.figures(record.result))
    names = [name for name in KEY_FIGURES.get(record.stage, ()) if name in found]
    if not names:
        names = [n for n in found if n not in ("mfu", "step", "best_step", "memory_bytes")]
    return [
        Figure(wording.label(name), wording.value(name, found[name]), _interval(name, found))
        for name in names[:MOST_KEY_FIGURES]
    ]


def figures_table(records: Sequence[Record]) -> Table:
    """Every figure of the results of runs of one stage, a column each."""
    found = [dict(wording.figures(record.result)) for record in records]
    keys = dict.fromkeys(key for one in found for key in one)
    rows = [
        (wording.label(key), *(wording.value(key, one.get(key)) for one in found)) for key in keys
    ]
    return Table("All figures", ("", *(record.name for record in records)), tuple(rows))


def nested_tables(record: Record) -> Iterator[Table]:
    """What a result or report.json holds besides figures, whatever it is called."""
    known = {"audit", "reliability"}
    if record.stage == "reward":
        known |= {"val_chosen", "val_rejected"}  # they are drawn
    for source in (record.result, record.report):
        groups = {k: v for k, v in source.items() if isinstance(v, dict) and v and k not in known}
        yield from _matrices(groups)
        for key, value in source.items():
            if isinstance(value, list) and value and key not in known:
                yield from _list_table(key, value)
    extra = wording.figures({k: v for k, v in record.report.items() if k not in record.result})
    if extra:
        rows = tuple((wording.label(k), wording.value(k, v)) for k, v in extra)
        yield Table("Report", ("", "value"), rows)


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
            (wording.label(key), *(_cell(key, column.get(key)) for column in columns))
            for key in keys
        ]
        title = wording.label(name) if len(names) == 1 or first is not columns[0] else " and ".join(
            wording.label(one).lower() for one in names).capitalize()  # fmt: skip
        heads = [wording.label(one) for one in names] if len(names) > 1 else ["value"]
        yield Table(title, ("", *heads), tuple(rows[:MOST_ROWS]))


def _list_table(key: str, value: list[Any]) -> Iterator[Table]:
    rows = [row for row in value if isinstance(row, dict)][:MOST_ROWS]
    if rows:
        keys = list(dict.fromkeys(name for row in rows for name in row))
        cells = tuple(tuple(_cell(name, row.get(name)) for name in keys) for row in rows)
        is_text = any(isinstance(v, str) and len(v) > 40 for row in rows for v in row.values())
        yield Table(wording.label(key), tuple(map(wording.label, keys)), cells, is_text)
    elif not (len(value) == 2 and all(isinstance(end, int | float) for end in value)):
        cells = tuple((_cell(key, one),) for one in value[:MOST_ROWS])
        yield Table(wording.label(key), (wording.label(key),), cells, is_text=True)


def settings_table(records: Sequence[Record]) -> Table | None:
    """Settings that differ from the defaults or between the runs; what came of `auto` beside it."""
    config = vars(stages).get(f"{records[0].stage.capitalize()}Config")
    if config is None:
        return None
    usual, rows = defaults(config), []
    for name in dict.fromkeys(key for record in records for key in record.recipe):
        values = [record.recipe.get(name) for record in records]
        same = all(value == values[0] for value in values)
        if name != "stage" and not (same and values[0] == usual.get(name)):
            row = (name, shown(usual.get(name)), *(shown(value) for value in values))
            rows.append(row if same else (f"{name} ≠", *row[1:]))
    heads = ("setting", "default", *(record.name for record in records))
    return Table("Settings that are not the default", heads, tuple(rows)) if rows else None


def defaults(config: type[Config]) -> dict[str, Any]:
    """A command's defaults, as a recipe has them."""
    fields = {n: f for n, f in config.model_fields.items() if not f.is_required()}
    made = config.model_construct(**{name: field.get_default() for name, field in fields.items()})
    return dict(made.model_dump(mode="json", include=set(fields), warnings=False))


def chosen_table(records: Sequence[Record]) -> Table | None:
    """What llmctl chose for itself: the plans of the runs."""
    plans = [_mapping(record.manifest.get("plan")) for record in records]
    keys = dict.fromkeys(key for plan in plans for key in plan)
    rows = tuple((key, *(shown(plan.get(key)) for plan in plans)) for key in keys)
    return Table("The plan", ("", *(r.name for r in records)), rows) if rows else None


def audit_tables(record: Record) -> Iterator[Table]:
    """What the data of a run held, training beside validation, and what was found wrong in it."""
    audit = record.manifest.get("audit")
    if not isinstance(audit, dict):
        return
    val = audit.get("val") if isinstance(audit.get("val"), dict) else None
    plain = {k: v for k, v in audit.items() if not isinstance(v, dict | list)}
    rows = []
    for key, value in plain.items():
        cells = [wording.value(key, value)]
        if val is not None:
            cells.append(wording.value(key, val[key]) if key in val else "")
        rows.append((wording.label(key), *cells))
    heads = ("", "training", "validation") if val is not None else ("", "value")
    yield Table("Data", heads, tuple(rows))
    findings = [one for one in audit.get("findings") or [] if isinstance(one, dict)]
    if findings:
        said = tuple(
            tuple(str(one.get(key, "")) for key in ("level", "message", "hint")) for one in findings
        )
        yield Table("Findings", ("level", "what", "what to do"), said, is_text=True)


def inputs_table(records: Iterable[Record]) -> Table | None:
    """What went in, with what tells it from all others."""
    rows = [
        (record.name, str(one.get("role")), str(one.get("path")), _mark(one))
        for record in records
        for one in record.manifest.get("inputs") or []
        if isinstance(one, dict)
    ]
    return Table("What went in", ("run", "role", "path", "sha256 or revision"), tuple(rows)) if (
        rows) else None  # fmt: skip


def machine_table(records: Sequence[Record]) -> tuple[Table | None, list[tuple[str, str]]]:
    """Where and with what the runs ran: what differs between them, and what does not."""
    facts = [_machine(record) for record in records]
    rows, same = [], []
    for key in dict.fromkeys(name for one in facts for name in one):
        values = [one.get(key, wording.MISSING) for one in facts]
        known = set(values) - {wording.MISSING}
        if len(known) == 1:
            same.append((key, known.pop()))
        elif known:
            rows.append((key, *values))
    heads = ("", *(record.name for record in records))
    return Table("What differs", heads, tuple(rows)) if rows else None, same


def _machine(record: Record) -> dict[str, str]:
    manifest = record.manifest
    return {
        "device": shown(manifest.get("device")),
        "threads": shown(manifest.get("threads")),
        "processes": shown(manifest.get("world_size")),
        "seed": shown(manifest.get("seed")),
        "commit": _commit(record),
        "started": shown(manifest.get("started"))[:16].replace("T", " "),
        "time": time_of(record),
        "energy": energy_of(record),
        "energy found by": shown(_mapping(manifest.get("energy")).get("method")),
        **{name: shown(number) for name, number in _mapping(manifest.get("versions")).items()},
    }


def time_of(record: Record) -> str:
    """How long a run worked."""
    return wording.MISSING if record.seconds is None else wording.seconds(record.seconds)


def energy_of(record: Record) -> str:
    """The energy that a run took, a dash where it was not counted."""
    kwh = _mapping(record.manifest.get("energy")).get("kwh")
    return wording.energy(kwh) if isinstance(kwh, int | float) else wording.MISSING


def shown(value: Any) -> str:
    """A setting as a recipe would have it, on one line."""
    if value is None or value == [] or value == "":
        return wording.MISSING
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
        return ", ".join(f"{name} {wording.value(name, one)}" for name, one in value.items())
    if isinstance(value, list) and any(isinstance(one, str | dict | list) for one in value):
        return cut(", ".join(map(str, value)))
    return cut(wording.value(key, value))


def _interval(name: str, found: Mapping[str, Any]) -> str:
    ends = found.get(f"{name}_interval") or [found.get(f"{name}_{end}") for end in ("low", "high")]
    if any(not isinstance(end, int | float) for end in ends):
        return ""
    return f"{wording.value(name, list(ends))} (95{wording.NARROW}%)"


def _commit(record: Record) -> str:
    git = _mapping(record.manifest.get("git"))
    if not isinstance(git.get("commit"), str):
        return wording.MISSING
    return str(git["commit"])[:12] + (" and changes" if git.get("dirty") else "")


def _mark(one: Mapping[str, Any]) -> str:
    mark = one.get("revision") or one.get("sha256")
    return str(mark)[:16] if mark else wording.MISSING


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}

"""Where runs come from, as tables: settings, plans, data, inputs, machines, versions.

In: records. Out: tables of texts, which a template escapes.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from llmctl import metrics, numbers
from llmctl.config import commands
from llmctl.config.base import Config
from llmctl.reporting.records import Record
from llmctl.reporting.tables import Table, mapping, shown


def settings_table(records: Sequence[Record]) -> Table | None:
    """Settings that differ from the defaults or between the runs; what came of `auto` beside it."""
    config = vars(commands).get(f"{records[0].stage.capitalize()}Config")
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
    title = "Settings that are not the default"
    title += "; ≠ marks those that differ" if len(records) > 1 else ""
    return Table(title, heads, tuple(rows)) if rows else None


def defaults(config: type[Config]) -> dict[str, Any]:
    """A command's defaults, as a recipe has them."""
    fields = {n: f for n, f in config.model_fields.items() if not f.is_required()}
    made = config.model_construct(**{name: field.get_default() for name, field in fields.items()})
    return dict(made.model_dump(mode="json", include=set(fields), warnings=False))


def chosen_table(records: Sequence[Record]) -> Table | None:
    """What llmctl chose for itself: the plans of the runs."""
    plans = [mapping(record.manifest.get("plan")) for record in records]
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
        cells = [metrics.value(key, value)]
        if val is not None:
            cells.append(metrics.value(key, val[key]) if key in val else "")
        rows.append((metrics.label(key), *cells))
    heads = ("", "training", "validation") if val is not None else ("", "value")
    yield Table("Data", heads, tuple(rows))
    findings = [one for one in audit.get("findings") or [] if isinstance(one, dict)]
    if findings:
        said = tuple(
            tuple(str(one.get(key, "")) for key in ("level", "message", "hint")) for one in findings
        )
        yield Table("Findings", ("level", "what", "what to do"), said, is_text=True)


def distinct_audits(records: Sequence[Record]) -> Iterator[tuple[str, Table]]:
    """The audits of runs of one stage with the run's name; without, where all are the same."""
    found = [(record.name, tuple(audit_tables(record))) for record in records]
    all_same = len({audits for _, audits in found}) == 1
    for name, audits in found[:1] if all_same else found:
        yield from (("" if all_same else name, table) for table in audits)


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
        values = [one.get(key, numbers.MISSING) for one in facts]
        known = set(values) - {numbers.MISSING}
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
        "energy found by": shown(mapping(manifest.get("energy")).get("method")),
        **{name: shown(number) for name, number in mapping(manifest.get("versions")).items()},
    }


def time_of(record: Record) -> str:
    """How long a run worked."""
    return numbers.MISSING if record.seconds is None else numbers.seconds(record.seconds)


def energy_of(record: Record) -> str:
    """The energy that a run took, a dash where it was not counted."""
    kwh = mapping(record.manifest.get("energy")).get("kwh")
    return numbers.energy(kwh) if isinstance(kwh, int | float) else numbers.MISSING


def _commit(record: Record) -> str:
    git = mapping(record.manifest.get("git"))
    if not isinstance(git.get("commit"), str):
        return numbers.MISSING
    return str(git["commit"])[:12] + (" and changes" if git.get("dirty") else "")


def _mark(one: Mapping[str, Any]) -> str:
    mark = one.get("revision") or one.get("sha256")
    return str(mark)[:16] if mark else numbers.MISSING

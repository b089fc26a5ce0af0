"""Tables of where runs come from: settings, plans, data, inputs, machines, versions.

In: records. Out: tables of texts, which a template escapes.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from llmctl import metrics, numbers
from llmctl.config.base import Config
from llmctl.config.commands import config_of
from llmctl.reporting.records import RunRecord, as_mapping
from llmctl.reporting.tables import Table, format_setting


def settings_table(records: Sequence[RunRecord]) -> Table | None:
    """Tabulate settings that differ from the defaults or between the runs."""
    config = config_of(records[0].stage)
    if config is None:
        return None
    usual, rows = defaults(config), []
    for name in dict.fromkeys(key for record in records for key in record.recipe):
        values = [record.recipe.get(name) for record in records]
        same = all(value == values[0] for value in values)
        if name != "stage" and not (same and values[0] == usual.get(name)):
            cells = map(format_setting, (usual.get(name), *values))
            rows.append((name if same else f"{name} ≠", *cells))
    heads = ("setting", "default", *(record.name for record in records))
    title = "Settings that are not the default"
    title += "; ≠ marks those that differ" if len(records) > 1 else ""
    return Table(title, heads, tuple(rows)) if rows else None


def defaults(config: type[Config]) -> dict[str, Any]:
    """Return a command's defaults, as a recipe has them."""
    fields = {n: f for n, f in config.model_fields.items() if not f.is_required()}
    unset = config.model_construct(**{name: field.get_default() for name, field in fields.items()})
    return dict(unset.model_dump(mode="json", include=set(fields), warnings=False))


def plan_table(records: Sequence[RunRecord]) -> Table | None:
    """Tabulate the runs' plans: settings that llmctl chose itself."""
    plans = [as_mapping(record.manifest.get("plan")) for record in records]
    keys = dict.fromkeys(key for plan in plans for key in plan)
    rows = tuple((key, *(format_setting(plan.get(key)) for plan in plans)) for key in keys)
    return Table("The plan", ("", *(r.name for r in records)), rows) if rows else None


def audit_tables(record: RunRecord) -> Iterator[Table]:
    """Tabulate the data of a run, training beside validation, and the audit's findings."""
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
    findings = tuple(
        tuple(str(finding.get(key, "")) for key in ("level", "message", "hint"))
        for finding in audit.get("findings") or []
        if isinstance(finding, dict)
    )
    if findings:
        yield Table("Findings", ("level", "what", "what to do"), findings, is_text=True)


def distinct_audits(records: Sequence[RunRecord]) -> Iterator[tuple[str, Table]]:
    """Yield run's name and audit tables; one audit without a name where all are the same."""
    tables = [(record.name, tuple(audit_tables(record))) for record in records]
    all_same = len({audits for _, audits in tables}) == 1
    for name, audits in tables[:1] if all_same else tables:
        yield from (("" if all_same else name, table) for table in audits)


def inputs_table(records: Iterable[RunRecord]) -> Table | None:
    """Tabulate the inputs of runs, each with its hash or revision."""
    rows = [
        (
            *(record.name, str(item.get("role")), str(item.get("path"))),
            str(item.get("revision") or item.get("sha256") or numbers.MISSING)[:16],
        )
        for record in records
        for item in record.manifest.get("inputs") or []
        if isinstance(item, dict)
    ]
    heads = ("run", "role", "path", "sha256 or revision")
    return Table("What went in", heads, tuple(rows)) if rows else None


def machine_table(records: Sequence[RunRecord]) -> tuple[Table | None, list[tuple[str, str]]]:
    """Return machines and versions: a table of what differs, and the rest as pairs."""
    machines = [_machine(record) for record in records]
    rows, same = [], []
    for key in dict.fromkeys(name for machine in machines for name in machine):
        values = [machine.get(key, numbers.MISSING) for machine in machines]
        known = set(values) - {numbers.MISSING}
        if len(known) == 1:
            same.append((key, known.pop()))
        elif known:
            rows.append((key, *values))
    heads = ("", *(record.name for record in records))
    return Table("What differs", heads, tuple(rows)) if rows else None, same


def _machine(record: RunRecord) -> dict[str, str]:
    manifest = record.manifest
    return {
        "device": format_setting(manifest.get("device")),
        "threads": format_setting(manifest.get("threads")),
        "processes": format_setting(manifest.get("world_size")),
        "seed": format_setting(manifest.get("seed")),
        "commit": _commit(record),
        "started": format_setting(manifest.get("started"))[:16].replace("T", " "),
        "time": time_of(record),
        "energy": energy_of(record),
        "energy found by": format_setting(as_mapping(manifest.get("energy")).get("method")),
        **{
            name: format_setting(number)
            for name, number in as_mapping(manifest.get("versions")).items()
        },
    }


def time_of(record: RunRecord) -> str:
    """Return how long a run worked."""
    return numbers.MISSING if record.seconds is None else numbers.seconds(record.seconds)


def energy_of(record: RunRecord) -> str:
    """Return the energy that a run took, a dash where it was not counted."""
    kwh = as_mapping(record.manifest.get("energy")).get("kwh")
    return numbers.energy(kwh) if isinstance(kwh, int | float) else numbers.MISSING


def _commit(record: RunRecord) -> str:
    git = as_mapping(record.manifest.get("git"))
    if not isinstance(git.get("commit"), str):
        return numbers.MISSING
    return str(git["commit"])[:12] + (" and changes" if git.get("dirty") else "")

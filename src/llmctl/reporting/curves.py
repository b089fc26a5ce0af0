"""Choose the curves of a stage: metrics of its runs in, panels of series out.

A metric and its held-out twin (`loss`, `val_loss`) share a panel, and so do the scores by source.
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from llmctl import metrics
from llmctl.numbers import is_number
from llmctl.reporting.records import RunRecord

TITLES = {
    "bits_per_byte": "Bits per byte",
    "kl": "KL from the reference",
    "loss": "Loss",
    "score": "Score",
    "score/": "Score by source",
    "win_rate": "Wins against the reference",
}
MARKED = ("val_loss", "val_score")
"""Metrics whose best step is marked."""
MOST_POINTS = 360
"""Most points of a series: more cannot be told apart."""
NOISY = 24
"""Points from which on a training series is also drawn smoothed."""
STEEP = 12
"""Ratio of the highest learning rate to the median from which on its axis is logarithmic."""
NOISELESS = ("lr", "kl_coef")
"""Never smoothed."""


@dataclass(frozen=True)
class Series:
    """One line."""

    label: str
    color: int
    """0 is the first of the palette."""
    is_held_out: bool
    points: tuple[tuple[float, float], ...]
    smooth: tuple[tuple[float, float], ...] = ()
    best: tuple[float, float] | None = None
    band: tuple[tuple[float, float, float], ...] = ()
    """Steps with the ends of an interval."""


@dataclass(frozen=True)
class Panel:
    """One diagram."""

    key: str
    title: str
    unit: str
    is_log: bool
    series: tuple[Series, ...]


def panels(records: Sequence[RunRecord]) -> tuple[list[Panel], list[Panel]]:
    """Build the panels of runs of one stage: those in sight, and the others.

    A lone point of a finished run is no curve.
    """
    rows = [row for record in records for row in record.metrics]
    keys = {key for row in rows for key, value in row.items() if _is_number(value)}
    if records[0].stage == "ppo":  # minus the objective, which is no loss of the policy's
        keys.discard("val_loss")
    groups: dict[str, list[str]] = {}
    drawn = [key for key in keys if _curve(key) != "none"]
    for key in sorted(drawn, key=lambda key: (key.startswith("val_"), key)):
        base, slash, _ = key.removeprefix("val_").partition("/")
        groups.setdefault(base + slash, []).append(key)
    several = len(records) > 1
    made = {base: _panel(base, names, records, several) for base, names in groups.items()}
    is_over = all(record.state == "completed" for record in records)
    shown = {
        base: panel
        for base, panel in made.items()
        if panel.series
        and not (is_over and all(len(series.points) == 1 for series in panel.series))
    }
    ordered = sorted(shown, key=metrics.place)
    in_sight = {base for base in ordered if any(_curve(key) == "first" for key in groups[base])}
    return (
        [shown[base] for base in ordered if base in in_sight],
        [shown[base] for base in ordered if base not in in_sight],
    )


def _curve(key: str) -> str:
    """Return where the table of metrics shows a key's curve; folded for one that is not in it."""
    metric = metrics.find(key)
    return "folded" if metric is None else metric.curve


def _panel(base: str, keys: list[str], records: Sequence[RunRecord], several: bool) -> Panel:
    sources = sorted({key.partition("/")[2] for key in keys if "/" in key})
    series = []
    for number, record in enumerate(records):
        for key in keys:
            source = key.partition("/")[2]
            own = sources.index(source) if source else int(key.startswith("val_"))
            color = number if several else own
            line = _series(record, key, color, several, alone=len(keys) == 1)
            if line is not None:
                series.append(line)
    values = [y for line in series for _, y in line.points]
    is_steep = bool(values) and max(values) > STEEP * statistics.median(values)
    is_log = base == "lr" and is_steep and min(values) > 0
    title = TITLES.get(base) or metrics.label(base)
    is_policy = base == "loss" and records[0].stage == "ppo"  # of a clipped term, in no unit
    unit = "" if is_policy else metrics.unit_of(base)
    return Panel(base, title, unit, is_log, tuple(series))


def _series(
    record: RunRecord, key: str, color: int, several: bool, *, alone: bool
) -> Series | None:
    points = list(_points(record, key))
    if not points or (len(points) < 2 and several and alone and not record.metrics):
        return None
    held_out = key.startswith("val_")
    kind = key.partition("/")[2] or ("held out" if held_out else "training")
    if held_out and "/" in key:
        kind += ", held out"
    is_noisy = not held_out and len(points) >= NOISY and key not in NOISELESS
    label = record.name if alone and several else f"{record.name}, {kind}" if several else kind
    best = record.result.get("best_step") if key in MARKED else None
    return Series(
        label=label,
        color=color,
        is_held_out=held_out,
        points=tuple(thinned(points)),
        smooth=tuple(thinned(smoothed(points))) if is_noisy else (),
        best=next(((x, y) for x, y in points if x == best), None),
        band=tuple(_band(record, key)),
    )


def _points(record: RunRecord, key: str) -> Iterator[tuple[float, float]]:
    """Yield step and value in order; of a step logged twice the last value counts."""
    values: dict[float, float] = {}
    for row in record.metrics:
        if _is_number(row.get("step")) and _is_number(row.get(key)):
            values[float(row["step"])] = float(row[key])
    yield from sorted(values.items())


def _band(record: RunRecord, key: str) -> Iterator[tuple[float, float, float]]:
    """Yield step and interval where `KEY_low` and `KEY_high` were logged."""
    names = ("step", f"{key}_low", f"{key}_high")
    for row in record.metrics:
        if all(_is_number(row.get(name)) for name in names):
            step, low, high = (float(row[name]) for name in names)
            yield step, low, high


def smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Smooth by an exponential mean over about a twentieth of the points, without initial bias.

    Divided by the sum of its weights (Kingma and Ba, 2015, arXiv:1412.6980, section 3).
    """
    keep = 1 - 1 / max(2.0, len(points) / 20)
    mean = weight = 0.0
    smooth = []
    for x, y in points:
        mean, weight = keep * mean + (1 - keep) * y, keep * weight + (1 - keep)
        smooth.append((x, mean / weight))
    return smooth


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points, of too many the lowest and the highest of each stretch."""
    if len(points) <= MOST_POINTS:
        return list(points)
    stretches = MOST_POINTS // 2
    edges = [round(place * len(points) / stretches) for place in range(stretches + 1)]
    kept: list[tuple[float, float]] = []
    for start, end in pairwise(edges):
        part = points[start:end]
        ends = {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
        kept += sorted(ends)
    return sorted({points[0], *kept, points[-1]})


def _is_number(value: Any) -> bool:
    return is_number(value) and math.isfinite(value)

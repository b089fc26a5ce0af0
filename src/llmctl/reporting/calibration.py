"""A reward model's own report as drawings: is it as sure as it is right, and how do scores lie?

In: `report` of its manifest. Out: places in a frame, for the template.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmctl import metrics, numbers
from llmctl.reporting.draw import Scale, Tick, spread, ticks
from llmctl.reporting.records import Record

SIZE = 212
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 10, 24
BARS = (400, 108)
RADIUS = (3.0, 11.0)


@dataclass(frozen=True)
class Dot:
    """The pairs of one bin."""

    x: float
    y: float
    radius: float
    about: str


@dataclass(frozen=True)
class Spread:
    """Where the scores of one side lie: 5, 25, 50, 75 and 95 of 100 below."""

    label: str
    style: str
    places: tuple[float, ...]
    about: str


@dataclass(frozen=True)
class Judgement:
    """What is drawn of a reward model."""

    dots: tuple[Dot, ...]
    ends: tuple[float, float, float, float]
    """Of the diagonal, on which confidence is right."""
    ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    spreads: tuple[Spread, ...]
    score_ticks: tuple[Tick, ...]
    error: str


def judgement(record: Record) -> Judgement | None:
    """The drawings of a run that has such a report, None for others."""
    report = record.manifest.get("report")
    if not isinstance(report, dict) or not isinstance(report.get("reliability"), list):
        return None
    x_scale = Scale(0.5, 1.0, LEFT, 400 - RIGHT)
    y_scale = Scale(0.0, 1.0, SIZE - BOTTOM, TOP)
    marks = [0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    spreads, score_ticks = _spreads(report)
    return Judgement(
        dots=tuple(_dots(report["reliability"], x_scale, y_scale)),
        ends=(x_scale(0.5), y_scale(0.5), x_scale(1.0), y_scale(1.0)),
        ticks=tuple(Tick(x_scale(at), f"{100 * at:.0f}") for at in marks),
        y_ticks=tuple(Tick(y_scale(at), f"{100 * at:.0f}") for at in (0, 0.25, 0.5, 0.75, 1)),
        spreads=spreads,
        score_ticks=score_ticks,
        error=metrics.value("calibration_error", report.get("calibration_error")),
    )


def _dots(bins: list[Any], x_scale: Scale, y_scale: Scale) -> list[Dot]:
    filled = [b for b in bins if isinstance(b, dict) and {"accuracy", "confidence"} <= b.keys()]
    most = max((b.get("weight", 0) for b in filled), default=0) or 1
    low, high = RADIUS
    return [
        Dot(
            x_scale(b["confidence"]),
            y_scale(b["accuracy"]),
            round(low + (high - low) * (b.get("weight", 0) / most) ** 0.5, 1),
            f"{b.get('weight', 0):g} pairs: {100 * b['confidence']:.1f} % sure, "
            f"{100 * b['accuracy']:.1f} % right",
        )
        for b in filled
    ]


def _spreads(report: Mapping[str, Any]) -> tuple[tuple[Spread, ...], tuple[Tick, ...]]:
    names = ("q5", "q25", "q50", "q75", "q95")
    sides = {side: report.get(side) for side in ("chosen", "rejected")}
    known = {s: f for s, f in sides.items() if isinstance(f, dict) and set(names) <= f.keys()}
    values = [found[name] for found in known.values() for name in names]
    if not values:
        return (), ()
    low, high = spread(min(values), max(values))
    scale = Scale(min(low, min(values)), high, 76, BARS[0] - RIGHT)
    drawn = tuple(
        Spread(
            side,
            "c1" if side == "chosen" else "c2",
            tuple(scale(found[name]) for name in names),
            f"{side}: median {found['q50']:.3g}, half of them between {found['q25']:.3g} and "
            f"{found['q75']:.3g}, nine of ten between {found['q5']:.3g} and {found['q95']:.3g}",
        )
        for side, found in known.items()
    )
    marks = tuple(Tick(scale(at), numbers.compact(at)) for at in ticks(scale.low, scale.high, 5))
    return drawn, marks

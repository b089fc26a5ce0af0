"""Charts of a reward model's report: calibration, and the distributions of scores.

In: `report` of its manifest. Out: places in a frame, for the template.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmctl import metrics, numbers
from llmctl.reporting.draw import Scale, Tick, spread, ticks
from llmctl.reporting.records import RunRecord

SIZE = 212
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 10, 24
BARS = (400, 108)
RADIUS = (3.0, 11.0)


@dataclass(frozen=True)
class CalibrationBin:
    """The pairs of one confidence bin."""

    x: float
    y: float
    radius: float
    description: str


@dataclass(frozen=True)
class ScoreDistribution:
    """Quantiles of one side's scores: 5, 25, 50, 75 and 95 %."""

    label: str
    style: str
    places: tuple[float, ...]
    description: str


@dataclass(frozen=True)
class CalibrationChart:
    """Everything drawn of a reward model."""

    dots: tuple[CalibrationBin, ...]
    ends: tuple[float, float, float, float]
    """Of the diagonal, on which confidence is right."""
    ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    distributions: tuple[ScoreDistribution, ...]
    score_ticks: tuple[Tick, ...]
    error: str


def calibration_chart(record: RunRecord) -> CalibrationChart | None:
    """Build the charts of a run with such a report, None for others."""
    report = record.manifest.get("report")
    if not isinstance(report, dict) or not isinstance(report.get("reliability"), list):
        return None
    x_scale = Scale(0.5, 1.0, LEFT, 400 - RIGHT)
    y_scale = Scale(0.0, 1.0, SIZE - BOTTOM, TOP)
    marks = [0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    distributions, score_ticks = _distributions(report)
    return CalibrationChart(
        dots=tuple(_bins(report["reliability"], x_scale, y_scale)),
        ends=(x_scale(0.5), y_scale(0.5), x_scale(1.0), y_scale(1.0)),
        ticks=tuple(Tick(x_scale(at), f"{100 * at:.0f}") for at in marks),
        y_ticks=tuple(Tick(y_scale(at), f"{100 * at:.0f}") for at in (0, 0.25, 0.5, 0.75, 1)),
        distributions=distributions,
        score_ticks=score_ticks,
        error=metrics.value("calibration_error", report.get("calibration_error")),
    )


def _bins(bins: list[Any], x_scale: Scale, y_scale: Scale) -> list[CalibrationBin]:
    filled = [b for b in bins if isinstance(b, dict) and {"accuracy", "confidence"} <= b.keys()]
    most = max((b.get("weight", 0) for b in filled), default=0) or 1
    low, high = RADIUS
    return [
        CalibrationBin(
            x_scale(b["confidence"]),
            y_scale(b["accuracy"]),
            round(low + (high - low) * (b.get("weight", 0) / most) ** 0.5, 1),
            f"{b.get('weight', 0):g} pairs: {100 * b['confidence']:.1f} % sure, "
            f"{100 * b['accuracy']:.1f} % right",
        )
        for b in filled
    ]


def _distributions(
    report: Mapping[str, Any],
) -> tuple[tuple[ScoreDistribution, ...], tuple[Tick, ...]]:
    names = ("q5", "q25", "q50", "q75", "q95")
    sides = {side: report.get(side) for side in ("chosen", "rejected")}
    known = {s: f for s, f in sides.items() if isinstance(f, dict) and set(names) <= f.keys()}
    values = [quantiles[name] for quantiles in known.values() for name in names]
    if not values:
        return (), ()
    low, high = spread(min(values), max(values))
    scale = Scale(min(low, min(values)), high, 76, BARS[0] - RIGHT)
    drawn = tuple(
        ScoreDistribution(
            side,
            "c1" if side == "chosen" else "c2",
            tuple(scale(quantiles[name]) for name in names),
            f"{side}: median {quantiles['q50']:.3g}, half of them between {quantiles['q25']:.3g} "
            f"and {quantiles['q75']:.3g}, nine of ten between {quantiles['q5']:.3g} and "
            f"{quantiles['q95']:.3g}",
        )
        for side, quantiles in known.items()
    )
    marks = tuple(Tick(scale(at), numbers.compact(at)) for at in ticks(scale.low, scale.high, 5))
    return drawn, marks

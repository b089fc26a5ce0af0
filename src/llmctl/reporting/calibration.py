"""Charts of a reward model's report: calibration, and the distributions of scores.

In: `report` of its manifest. Out: places in a frame, for the template.
"""

from collections.abc import Mapping
from typing import Any

from llmctl import metrics, numbers
from llmctl.reporting.draw import Scale, Tick, spread, ticks
from llmctl.reporting.records import RunRecord

SIZE = 212
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 10, 24
BARS = (400, 108)
RADIUS = (3.0, 11.0)


def calibration_chart(record: RunRecord) -> dict[str, Any] | None:
    """Build the charts of a run with such a report, None for others.

    Dots are bins of confidence, `ends` are of the diagonal, on which confidence is right.
    """
    report = record.manifest.get("report")
    if not isinstance(report, dict) or not isinstance(report.get("reliability"), list):
        return None
    x_scale = Scale(0.5, 1.0, LEFT, 400 - RIGHT)
    y_scale = Scale(0.0, 1.0, SIZE - BOTTOM, TOP)
    marks = [0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    distributions, score_ticks = _distributions(report)
    return {
        "dots": _bins(report["reliability"], x_scale, y_scale),
        "ends": (x_scale(0.5), y_scale(0.5), x_scale(1.0), y_scale(1.0)),
        "ticks": [Tick(x_scale(at), f"{100 * at:.0f}") for at in marks],
        "y_ticks": [Tick(y_scale(at), f"{100 * at:.0f}") for at in (0, 0.25, 0.5, 0.75, 1)],
        "distributions": distributions,
        "score_ticks": score_ticks,
        "error": metrics.value("calibration_error", report.get("calibration_error")),
    }


def _bins(bins: list[Any], x_scale: Scale, y_scale: Scale) -> list[dict[str, Any]]:
    """Place the bins, each with an area by its number of pairs."""
    filled = [b for b in bins if isinstance(b, dict) and {"accuracy", "confidence"} <= b.keys()]
    most = max((b.get("weight", 0) for b in filled), default=0) or 1
    low, high = RADIUS
    return [
        {
            "x": x_scale(b["confidence"]),
            "y": y_scale(b["accuracy"]),
            "radius": round(low + (high - low) * (b.get("weight", 0) / most) ** 0.5, 1),
            "description": f"{b.get('weight', 0):g} pairs: {100 * b['confidence']:.1f} % sure, "
            f"{100 * b['accuracy']:.1f} % right",
        }
        for b in filled
    ]


def _distributions(report: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[Tick]]:
    """Place the quantiles of each side's scores; also the marks of their axis."""
    names = ("q5", "q25", "q50", "q75", "q95")
    sides = {side: report.get(side) for side in ("chosen", "rejected")}
    known = {s: f for s, f in sides.items() if isinstance(f, dict) and set(names) <= f.keys()}
    values = [quantiles[name] for quantiles in known.values() for name in names]
    if not values:
        return [], []
    low, high = spread(min(values), max(values))
    scale = Scale(min(low, min(values)), high, 76, BARS[0] - RIGHT)
    drawn = [
        {
            "label": side,
            "style": "c1" if side == "chosen" else "c2",
            "places": [scale(quantiles[name]) for name in names],
            "description": f"{side}: median {quantiles['q50']:.3g}, half of them between "
            f"{quantiles['q25']:.3g} and {quantiles['q75']:.3g}, nine of ten between "
            f"{quantiles['q5']:.3g} and {quantiles['q95']:.3g}",
        }
        for side, quantiles in known.items()
    ]
    marks = [Tick(scale(at), numbers.compact(at)) for at in ticks(scale.low, scale.high, 5)]
    return drawn, marks

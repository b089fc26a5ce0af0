"""Lay panels out as SVG charts: scales, ticks and paths, in a frame that the page scales.

In: panels. Out: charts in the frame's units, and the data of the script that shows values.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmctl import metrics, numbers
from llmctl.reporting.curves import Panel, Series

WIDTH, HEIGHT = 400, 212
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 10, 24
TICKS = 4
FEW = 20
"""Points up to which each gets a dot."""
COLORS = 6
"""Colours of the palette; further series are dashed."""


@dataclass(frozen=True)
class Scale:
    """Map the values of an axis to places in the frame."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        """Return the place of a value."""
        low, high, at = (
            (math.log10(v) for v in (self.low, self.high, value))
            if self.is_log
            else (self.low, self.high, value)
        )
        share = (at - low) / (high - low)
        return round(self.start + share * (self.end - self.start), 2)


@dataclass(frozen=True)
class Tick:
    """A mark of an axis."""

    place: float
    text: str


@dataclass(frozen=True)
class ChartLine:
    """A series, laid out."""

    label: str
    style: str
    """Classes: colour, dashes, held out or not."""
    path: str
    smooth: str
    band: str
    dots: tuple[tuple[float, float], ...]
    best: tuple[float, float] | None
    last: str
    """Its last value, as text."""


@dataclass(frozen=True)
class Chart:
    """A panel, laid out."""

    panel: Panel
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[ChartLine, ...]
    description: str
    """The chart in words, for those who cannot see it."""
    data: dict[str, Any]
    """For the script that shows values under the pointer."""


def draw(panel: Panel) -> Chart:
    """Lay a panel out."""
    xs = [x for series in panel.series for x, _ in series.points]
    ys = [y for series in panel.series for _, y in series.points]
    ys += [end for series in panel.series for _, *ends in series.band for end in ends]
    x_low, x_high = spread(min(xs), max(xs)) if min(xs) == max(xs) else (min(xs), max(xs))
    x_scale = Scale(x_low, x_high, LEFT, WIDTH - RIGHT)
    y_low, y_high = spread(min(ys), max(ys), is_log=panel.is_log)
    y_scale = Scale(y_low, y_high, HEIGHT - BOTTOM, TOP, panel.is_log)
    y_at = log_ticks(y_low, y_high) if panel.is_log else ticks(y_low, y_high)
    x_at = [x for x in ticks(x_low, x_high, 5) if x == int(x)]
    lines = tuple(_line(panel.key, series, x_scale, y_scale) for series in panel.series)
    ends = "; ".join(f"{line.label} {line.last}" for line in lines)
    return Chart(
        panel,
        x_ticks=tuple(Tick(x_scale(x), numbers.compact(x)) for x in x_at),
        y_ticks=tuple(Tick(y_scale(y), metrics.number(panel.key, y)) for y in y_at),
        lines=lines,
        description=f"{panel.title} by step. At the end: {ends}.",
        data={
            "x": [x_low, x_high],
            "y": [y_low, y_high],
            "log": panel.is_log,
            "series": [_shown_values(panel.key, series) for series in panel.series],
        },
    )


def _shown_values(key: str, series: Series) -> dict[str, Any]:
    return {
        "label": series.label,
        "points": [[float(f"{x:.8g}"), float(f"{y:.5g}")] for x, y in series.points],
        "texts": [metrics.with_unit(key, y) for _, y in series.points],
    }


def spread(low: float, high: float, *, is_log: bool = False) -> tuple[float, float]:
    """Return the ends of an axis: a little beyond the values, and never the same."""
    if is_log:
        return low / 1.15, high * 1.15
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    below = low - margin
    return (0.0 if low >= 0 > below else below), high + margin


def ticks(low: float, high: float, most: int = TICKS) -> list[float]:
    """Return at most about so many round numbers between two: multiples of 1, 2 or 5."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * power for unit in (1, 2, 5, 10) if unit * power >= rough * 0.7)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return the powers of ten between two numbers."""
    first, last = math.ceil(math.log10(low)), math.floor(math.log10(high))
    return [10.0**number for number in range(first, last + 1)] or [low, high]


def _line(key: str, series: Series, x_scale: Scale, y_scale: Scale) -> ChartLine:
    style = [f"c{series.color % COLORS + 1}", "held" if series.is_held_out else "fit"]
    if series.color >= COLORS:
        style.append("dashed")
    if series.smooth:
        style.append("noisy")
    placed = [(x_scale(x), y_scale(y)) for x, y in series.points]
    few = len(placed) <= FEW
    band = [(x_scale(x), y_scale(a), y_scale(b)) for x, a, b in series.band]
    edge = [(x, low) for x, low, _ in band] + [(x, high) for x, _, high in reversed(band)]
    return ChartLine(
        label=series.label,
        style=" ".join(style),
        path=_path(placed),
        smooth=_path([(x_scale(x), y_scale(y)) for x, y in series.smooth]),
        band=f"{_path(edge)}Z" if edge else "",
        dots=tuple(placed) if len(placed) == 1 or (series.is_held_out and few) else (),
        best=(x_scale(series.best[0]), y_scale(series.best[1])) if series.best else None,
        last=metrics.number(key, series.points[-1][1]),
    )


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in points) if points else ""

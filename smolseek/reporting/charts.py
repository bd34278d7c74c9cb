"""Charts as data, and the scales they are drawn to: what the page and the PNGs share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

MAX_POINTS = 240
"""Most points drawn of one line; longer ones are means over as many stretches."""
HEAT_EDGES = (0.25, 0.5, 0.75, 0.9, 1.1, 1.25, 1.5, 2.0)
"""Where the colours of an expert's load change, in fair shares."""


@dataclass(frozen=True)
class Line:
    """A line, or with `marked` points joined by one.

    Its colour says which of a few things it is (`hue`), or where it stands in an order, 0 to 1 (`rank`); grey without.
    """

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    hue: int | None = None
    rank: float | None = None
    dashed: bool = False
    marked: bool = False


@dataclass(frozen=True)
class LineChart:
    """Lines over one axis."""

    title: str
    note: str
    x_name: str
    lines: list[Line]
    from_zero: bool = False
    log: bool = False
    x_format: str = ",.0f"
    y_format: str = ",.4g"
    each_x: bool = False
    """A tick at each of the few positions."""


@dataclass(frozen=True)
class HeatPanel:
    """Rows by columns of numbers."""

    name: str
    rows: list[list[float]]


@dataclass(frozen=True)
class HeatMap:
    """Panels over the same columns: experts by steps, in fair shares."""

    title: str
    note: str
    xs: Sequence[float]
    panels: list[HeatPanel]


Chart = LineChart | HeatMap


@dataclass(frozen=True)
class Scale:
    """Positions between 0 and 1 of the numbers between two ends, and where ticks stand."""

    low: float
    high: float
    ticks: list[float]
    log: bool = False

    def __call__(self, value: float) -> float:
        if self.log:
            return math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def y_scale(chart: LineChart) -> Scale:
    """Round numbers around all that is drawn; logarithmic where the chart asks for it and the numbers allow it."""
    values = [y for line in chart.lines for y in line.ys]
    low, high = min(values, default=0.0), max(values, default=1.0)
    if chart.log and low > 0 and high / low > 3:
        ticks = [t for t in log_ticks(low, high) if t]
        return Scale(min(low, ticks[0]), max(high, ticks[-1]), ticks, log=True)
    low = min(low, 0.0) if chart.from_zero else low
    ticks = round_ticks(low, high, 4)
    return Scale(ticks[0], ticks[-1], ticks)


def x_scale(chart: LineChart) -> Scale:
    """From the first to the last position, ticks at round numbers between them."""
    return column_scale([x for line in chart.lines for x in line.xs], each=chart.each_x)


def column_scale(xs: Sequence[float], *, each: bool = False) -> Scale:
    """As `x_scale`, of positions themselves."""
    low, high = min(xs, default=0.0), max(xs, default=1.0)
    if low == high:
        return Scale(low - 1, high + 1, [low])
    named = sorted(set(xs))
    if each and len(named) <= 8:
        return Scale(low, high, named)
    return Scale(low, high, [tick for tick in round_ticks(low, high, 4) if low <= tick <= high])


def round_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` steps of 1, 2, 2.5 or 5 times a power of ten, from below `low` to above `high`."""
    span = high - low or abs(high) or 1.0
    size = 10 ** math.floor(math.log10(span / count))
    step = next(factor * size for factor in (1, 2, 2.5, 5, 10) if factor * size * count >= span * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, max(last, first + 1) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten around two positive numbers; fewer of them over many powers."""
    factors = (1, 2, 5) if high / low < 200 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [factor * 10.0**power for power in powers for factor in factors]
    first = max((i for i, tick in enumerate(ticks) if tick <= low), default=0)
    last = min((i for i, tick in enumerate(ticks) if tick >= high), default=len(ticks) - 1)
    return [round(tick, 12) for tick in ticks[first : last + 1]]


def thin(line: Line) -> Line:
    """The line with at most `MAX_POINTS` points, each the mean of a stretch."""
    return replace(line, xs=stretch_means(line.xs, MAX_POINTS), ys=stretch_means(line.ys, MAX_POINTS))


def thin_columns(chart: HeatMap, columns: int) -> HeatMap:
    """The heat map with at most so many columns, each the mean of a stretch."""
    panels = [HeatPanel(panel.name, [stretch_means(row, columns) for row in panel.rows]) for panel in chart.panels]
    return replace(chart, xs=stretch_means(chart.xs, columns), panels=panels)


def stretch_means(values: Sequence[float], count: int) -> list[float]:
    """The values, or of more than `count` the means of as many stretches."""
    if len(values) <= count:
        return list(values)
    edges = pairwise(len(values) * number // count for number in range(count + 1))
    return [sum(values[a:b]) / (b - a) for a, b in edges]


def heat_level(value: float) -> int:
    """Which of the colours a load has: 0 for the least, 4 about a fair share, 8 for the most."""
    return sum(value > edge for edge in HEAT_EDGES)

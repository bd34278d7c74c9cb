"""Charts as data, and their scales; shared by the page and the PNGs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

MAX_POINTS = 240
"""Most points drawn of one line; a longer line is drawn as the means of this many segments."""
HEAT_EDGES = (0.25, 0.5, 0.75, 0.9, 1.1, 1.25, 1.5, 2.0)
"""Loads at which the colour of an expert's load changes, in fair shares."""


@dataclass(frozen=True)
class Line:
    """A line; with `marked` its points are drawn too.

    Its colour is a number of the palette (`hue`), or a place between 0 and 1 on the colour ramp (`rank`), or grey if
    both are None.
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
    """Lines over a common x axis."""

    title: str
    note: str
    x_name: str
    lines: list[Line]
    from_zero: bool = False
    log: bool = False
    x_format: str = ",.0f"
    y_format: str = ",.4g"
    each_x: bool = False
    """Whether each x gets a tick, if there are at most 8 of them."""


@dataclass(frozen=True)
class HeatPanel:
    """A named matrix of numbers."""

    name: str
    rows: list[list[float]]


@dataclass(frozen=True)
class HeatMap:
    """Panels with common columns: each cell is the load of an expert (row) at a step (column), in fair shares."""

    title: str
    note: str
    xs: Sequence[float]
    panels: list[HeatPanel]


Chart = LineChart | HeatMap


@dataclass(frozen=True)
class Scale:
    """Maps numbers from `low` to `high` to positions from 0 to 1, and holds the ticks."""

    low: float
    high: float
    ticks: list[float]
    log: bool = False

    def __call__(self, value: float) -> float:
        if self.log:
            return math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def y_scale(chart: LineChart) -> Scale:
    """Returns a scale between round numbers that holds all values.

    It is logarithmic if the chart asks for it, all values are positive, and the largest is over 3 times the smallest.
    """
    values = [y for line in chart.lines for y in line.ys]
    low, high = min(values, default=0.0), max(values, default=1.0)
    if chart.log and low > 0 and high / low > 3:
        ticks = [t for t in log_ticks(low, high) if t]
        return Scale(min(low, ticks[0]), max(high, ticks[-1]), ticks, log=True)
    low = min(low, 0.0) if chart.from_zero else low
    ticks = round_ticks(low, high, 4)
    return Scale(ticks[0], ticks[-1], ticks)


def x_scale(chart: LineChart) -> Scale:
    """Returns a scale from the smallest to the largest x, with ticks at round numbers between them."""
    return position_scale([x for line in chart.lines for x in line.xs], each=chart.each_x)


def position_scale(xs: Sequence[float], *, each: bool = False) -> Scale:
    """Returns what `x_scale` returns, for a list of x; with `each` every x gets a tick if there are at most 8."""
    low, high = min(xs, default=0.0), max(xs, default=1.0)
    if low == high:
        return Scale(low - 1, high + 1, [low])
    distinct = sorted(set(xs))
    if each and len(distinct) <= 8:
        return Scale(low, high, distinct)
    return Scale(low, high, [tick for tick in round_ticks(low, high, 4) if low <= tick <= high])


def round_ticks(low: float, high: float, count: int) -> list[float]:
    """Returns ticks from at most `low` to at least `high`, about `count` steps of 1, 2, 2.5 or 5 times a power of ten
    apart."""
    span = high - low or abs(high) or 1.0
    size = 10 ** math.floor(math.log10(span / count))
    step = next(factor * size for factor in (1, 2, 2.5, 5, 10) if factor * size * count >= span * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, max(last, first + 1) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Returns ticks around two positive numbers: 1, 2 and 5 times powers of ten, or only powers for a wide range."""
    factors = (1, 2, 5) if high / low < 200 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [factor * 10.0**power for power in powers for factor in factors]
    first = max((i for i, tick in enumerate(ticks) if tick <= low), default=0)
    last = min((i for i, tick in enumerate(ticks) if tick >= high), default=len(ticks) - 1)
    return [round(tick, 12) for tick in ticks[first : last + 1]]


def downsample(line: Line) -> Line:
    """Returns the line with at most `MAX_POINTS` points, each the mean of a segment."""
    return replace(line, xs=segment_means(line.xs, MAX_POINTS), ys=segment_means(line.ys, MAX_POINTS))


def downsample_columns(chart: HeatMap, columns: int) -> HeatMap:
    """Returns the heat map with at most `columns` columns, each the mean of a segment."""
    panels = [HeatPanel(panel.name, [segment_means(row, columns) for row in panel.rows]) for panel in chart.panels]
    return replace(chart, xs=segment_means(chart.xs, columns), panels=panels)


def segment_means(values: Sequence[float], count: int) -> list[float]:
    """Returns the values, or the means of `count` segments if there are more values than that."""
    if len(values) <= count:
        return list(values)
    edges = pairwise(len(values) * number // count for number in range(count + 1))
    return [sum(values[a:b]) / (b - a) for a, b in edges]


def heat_level(value: float) -> int:
    """Returns the number of a load's colour: 0 for the lowest loads, 4 around a fair share, 8 for the highest."""
    return sum(value > edge for edge in HEAT_EDGES)

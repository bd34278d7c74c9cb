"""Draws charts as HTML and SVG.

A plot is an SVG that stretches to any width. Its labels are HTML text beside it, so they stay readable on a phone. A
table below holds its numbers; the page's script reads from it the values to show at the pointer.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import groupby

from smolseek.reporting.charts import (
    Chart,
    HeatMap,
    HeatPanel,
    Line,
    LineChart,
    Scale,
    downsample,
    downsample_columns,
    heat_level,
    position_scale,
    x_scale,
    y_scale,
)

HUES = 8
HEAT_NAMES = ("to ¼", "½", "¾", "0.9", "fair", "1¼", "1½", "2", "more")
"""The upper ends of the colours of a load, in fair shares."""
_SIZE = 1000


def figure(chart: Chart, heat_cells: int) -> str:
    """Returns a chart with its legend, read-outs and table; a heat map gets at most about `heat_cells` cells."""
    if isinstance(chart, LineChart):
        return _line_figure(chart)
    columns = max(12, min(120, heat_cells // sum(len(panel.rows) for panel in chart.panels)))
    return _heat_figure(downsample_columns(chart, columns))


def table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "", *, text: bool = False) -> str:
    """Returns a table whose first column heads its rows; `text` means that no column holds numbers."""
    header = "".join(f'<th scope="col">{escape(name)}' for name in head)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}' + "".join(f"<td>{escape(value)}" for value in rest)
        for first, *rest in rows
    )
    caption_html = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f"<table{' class=text' if text else ''}>{caption_html}<tr>{header}{body}</table>"


def collapsible(summary: str, content: str) -> str:
    """Returns content that is hidden until its summary is opened."""
    return f'<details><summary>{escape(summary)}</summary><div class="scroll">{content}</div></details>'


# -- lines ------------------------------------------------------------------------------------------------------------


def _line_figure(chart: LineChart) -> str:
    lines = [downsample(line) for line in chart.lines]
    across, up = x_scale(chart), y_scale(chart)
    grid = "".join(f"M0 {_svg_y(up(tick))}H{_SIZE}" for tick in up.ticks)
    paths = f'<path class="grid" d="{grid}"/>' + "".join(_paths(line, across, up) for line in lines)
    last_values = ", ".join(f"{line.name} {line.ys[-1]:{chart.y_format}}" for line in lines if line.ys)
    ys = "".join(f'<b style="bottom:{100 * up(tick):.2f}%">{tick:,.10g}</b>' for tick in up.ticks)
    xs = "".join(f'<b style="left:{100 * across(tick):.2f}%">{tick:{chart.x_format}}</b>' for tick in across.ticks)
    widest = max((f"{tick:,.10g}" for tick in up.ticks), key=len)
    return f"""<figure class="chart">
<h3>{escape(chart.title)}</h3><p class="note">{escape(chart.note)}</p>
{_legend(chart, lines)}
<div class="frame"><div class="ys"><span>{widest}</span>{ys}</div>
<div class="plot" tabindex="0" role="group" aria-label="{escape(chart.title)}; arrow keys read its values" \
data-low="{across.low}" data-high="{across.high}">
<svg viewBox="0 0 {_SIZE} {_SIZE}" preserveAspectRatio="none" role="img" \
aria-label="{escape(f"{chart.title} by {chart.x_name}, last: {last_values}")}">{paths}</svg><i class="cross"></i></div>
<div class="xs">{xs}</div></div><p class="x-name">{escape(chart.x_name)}</p>
{collapsible("Numbers", _line_table(chart, lines))}
</figure>"""


def _paths(line: Line, across: Scale, up: Scale) -> str:
    points = [f"{_SIZE * across(x):.1f} {_svg_y(up(y))}" for x, y in zip(line.xs, line.ys, strict=True)]
    path = f'<path {_dash_class(line)} {_color_style(line)} d="M{"L".join(points)}"/>' if points else ""
    dots = "".join(f"M{point}h0" for point in points)
    return path + (f'<path class="dots" {_color_style(line)} d="{dots}"/>' if line.marked and points else "")


def _legend(chart: LineChart, lines: Sequence[Line]) -> str:
    """Returns each line's name and, if x is the step, its last value.

    The page's script replaces the last value by the value at the pointer.
    """
    last = chart.x_name == "step"
    items = "".join(
        '<li><svg width="22" height="10" aria-hidden="true">'
        f'<path {_dash_class(line)} {_color_style(line)} d="M2 5H20"/></svg>'
        f"<span>{escape(line.name)}</span> "
        f"<output>{f'{line.ys[-1]:{chart.y_format}}' if last and line.ys else ''}</output></li>"
        for line in lines
    )
    return f'<ul class="legend" aria-live="polite">{items}<li class="at">{"at the end" if last else ""}</li></ul>'


def _line_table(chart: LineChart, lines: Sequence[Line]) -> str:
    values = [dict(zip(line.xs, line.ys, strict=True)) for line in lines]
    rows = [
        [f"{x:{chart.x_format}}", *(f"{by_x[x]:{chart.y_format}}" if x in by_x else "" for by_x in values)]
        for x in sorted({x for by_x in values for x in by_x})
    ]
    return table([chart.x_name, *(line.name for line in lines)], rows)


def _dash_class(line: Line) -> str:
    return 'class="dashed"' if line.dashed else ""


def _color_style(line: Line) -> str:
    if line.hue is not None:
        return f'style="--c:var(--hue{line.hue % HUES})"'
    if line.rank is not None:
        return f'style="--c:color-mix(in oklab,var(--rank0),var(--rank1) {100 * line.rank:.0f}%)"'
    return ""


def _svg_y(share: float) -> str:
    """Returns a height between 0 and 1 as an SVG coordinate, which counts downwards."""
    return f"{_SIZE * (1 - share):.1f}"


# -- heat maps --------------------------------------------------------------------------------------------------------


def _heat_figure(chart: HeatMap) -> str:
    levels = "".join(
        f'<li><i style="background:var(--heat{level})"></i>{name}</li>' for level, name in enumerate(HEAT_NAMES)
    )
    heads = ["expert", *(f"{x:,.0f}" for x in chart.xs)]
    tables = "".join(
        table(heads, [[str(e), *(f"{v:.2f}" for v in row)] for e, row in enumerate(panel.rows)], panel.name)
        for panel in chart.panels
    )
    return f"""<figure class="chart wide heat">
<h3>{escape(chart.title)}</h3><p class="note">{escape(chart.note)}</p>
<ul class="levels" aria-label="colours, in fair shares">{levels}</ul>
<p class="readout" aria-live="polite">Point at a cell for its load.</p>
<div class="panels">{"".join(_panel(panel, chart.xs) for panel in chart.panels)}</div>
{collapsible("Numbers", tables)}
</figure>"""


def _panel(panel: HeatPanel, xs: Sequence[float]) -> str:
    rows, columns = len(panel.rows), len(xs)
    ends = position_scale(xs)
    flat = [value for row in panel.rows for value in row]
    description = f"{panel.name}: loads from {min(flat):.2f} to {max(flat):.2f} fair shares"
    return f"""<div><h4>{escape(panel.name)}</h4><div class="frame">
<div class="ys"><span>{rows - 1}</span><b style="bottom:{50 / rows:.1f}%">0</b>\
<b style="bottom:{100 - 50 / rows:.1f}%">{rows - 1}</b></div>
<div class="plot" style="--height:{max(80, min(180, 8 * rows))}px" tabindex="0" role="group" \
aria-label="{escape(panel.name)}; arrow keys read its values">
<svg viewBox="0 0 {columns} {rows}" preserveAspectRatio="none" shape-rendering="crispEdges" role="img" \
aria-label="{escape(description)}">{_cells(panel.rows)}</svg><i class="cross"></i></div>
<div class="xs"><b>{ends.low:,.0f}</b><b>{ends.high:,.0f}</b></div></div></div>"""


def _cells(rows: Sequence[Sequence[float]]) -> str:
    """Returns one SVG path per colour, made of the runs of cells with that colour."""
    drawn: dict[int, list[str]] = {}
    for number, row in enumerate(rows):
        x = 0
        for level, cells in groupby(heat_level(value) for value in row):
            width = len(list(cells))
            drawn.setdefault(level, []).append(f"M{x} {len(rows) - 1 - number}h{width}v1h-{width}z")
            x += width
    return "".join(f'<path style="fill:var(--heat{level})" d="{"".join(d)}"/>' for level, d in sorted(drawn.items()))

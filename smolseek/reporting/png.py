"""Draws charts as PNGs for papers with matplotlib, which is imported only when a chart is drawn."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

from smolseek.reporting.charts import HEAT_EDGES, Chart, HeatMap, Line, LineChart, Scale, x_scale, y_scale

NEEDS_MATPLOTLIB = "matplotlib: not installed, and PNGs need it; run pip install 'smolseek[report]'"


def check_matplotlib() -> None:
    """Raises ValueError if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(NEEDS_MATPLOTLIB)


def draw_png(chart: Chart, path: Path) -> None:
    """Draws one chart as a PNG.

    Raises:
        ValueError: matplotlib is not installed.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    if isinstance(chart, HeatMap):
        _draw_heat(chart, figure)
    else:
        _draw_lines(chart, figure)
    figure.savefig(path, dpi=150, format="png", metadata={"Software": None})


def _draw_lines(chart: LineChart, figure: Any) -> None:
    figure.set_size_inches(6, 3.6)
    axes = figure.subplots()
    across, up = x_scale(chart), y_scale(chart)
    for line in chart.lines:
        marker, style = "o" if line.marked else None, "--" if line.dashed else "-"
        axes.plot(line.xs, line.ys, style, color=_color(line), marker=marker, ms=4, lw=1.4, label=line.name)
    axes.set_yscale("log" if up.log else "linear")
    axes.minorticks_off()
    axes.set(title=chart.title, xlabel=chart.x_name, ylim=(up.low, up.high))
    _set_ticks(axes.xaxis, across, chart.x_format)
    _set_ticks(axes.yaxis, up, ",.10g")
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", frameon=False, fontsize=8, ncols=min(4, len(chart.lines)))


def _set_ticks(axis: Any, scale: Scale, form: str) -> None:
    axis.set_ticks(scale.ticks, [f"{tick:{form}}" for tick in scale.ticks])


def _color(line: Line) -> Any:
    from matplotlib import colormaps

    if line.hue is not None:
        return f"C{line.hue}"
    return "0.5" if line.rank is None else colormaps["viridis"](0.9 * line.rank)


def _draw_heat(chart: HeatMap, figure: Any) -> None:
    columns = min(len(chart.panels), math.ceil(math.sqrt(len(chart.panels))))
    rows = math.ceil(len(chart.panels) / columns)
    figure.set_size_inches(3 * columns + 1, 2 * rows)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    edges = (chart.xs[0], max(chart.xs[-1], chart.xs[0] + 1), -0.5, len(chart.panels[0].rows) - 0.5)
    image: Any = None
    for axis, panel in zip(axes.flat, chart.panels, strict=False):
        options = {"aspect": "auto", "origin": "lower", "interpolation": "nearest", "cmap": "RdBu_r"}
        image = axis.imshow(panel.rows, extent=edges, vmin=0, vmax=HEAT_EDGES[-1], **options)
        axis.set_title(panel.name, fontsize=9)
    for axis in axes.flat[len(chart.panels) :]:
        axis.set_visible(False)
    figure.supxlabel("step")
    figure.supylabel("expert")
    figure.colorbar(image, ax=axes, label="load over fair share")

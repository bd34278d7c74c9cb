"""Writes a report: the page and, if wanted, a PNG for each of its charts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from smolseek.checkpoint.atomic import atomic_file, refuse_existing, refuse_other_file
from smolseek.reporting.charts import Chart
from smolseek.reporting.page import render, sections
from smolseek.reporting.png import check_matplotlib, draw_png
from smolseek.reporting.read import Conversion, Run, read_folders


def write_report(folders: Sequence[Path], out: Path, *, png: bool = False, force: bool = False) -> list[Path]:
    """Writes the report of runs and conversions to `out`, with PNGs beside it, and returns the paths.

    Either all files are written or none.

    Raises:
        ValueError: a folder is neither a run nor a conversion, a file exists and `force` is not set, or PNGs are wanted
            and matplotlib is not installed.
        OSError: a file cannot be written.
    """
    if png:
        check_matplotlib()
    runs, conversions = read_folders(folders)
    try:
        page, drawn = _draw(runs, conversions)
    except ValueError:
        for run in runs:  # each alone, so that the message names the folder
            _draw([run], [])
        for conversion in conversions:
            _draw([], [conversion])
        raise
    charts: dict[Path, Chart] = {}
    for heading, chart in ((heading, chart) for heading, group in drawn.items() for chart in group if png):
        name, number = f"{out.stem}-{_slug(heading)}-{_slug(chart.title)}", 1
        while (path := out.with_name(f"{name}{'' if number == 1 else f'-{number}'}.png")) in charts:
            number += 1
        charts[path] = chart
    for path, beginning in {out: b"<!doctype html>", **dict.fromkeys(charts, b"\x89PNG")}.items():
        refuse_other_file(path, beginning)
        refuse_existing(path, force)
    with ExitStack() as files:
        files.enter_context(atomic_file(out, force=force)).write_bytes(page)
        for path, chart in charts.items():
            draw_png(chart, files.enter_context(atomic_file(path, force=force)))
    return [out, *charts]


def _draw(runs: Sequence[Run], conversions: Sequence[Conversion]) -> tuple[bytes, dict[str, list[Chart]]]:
    """Returns the page and the charts by heading.

    Raises:
        ValueError: a file of the folders has other values than smolseek writes, which any part of the drawing may meet.
    """
    try:
        return render(runs, conversions).encode(), sections(runs, conversions)
    except Exception as error:
        names = ", ".join(dict.fromkeys([*(run.name for run in runs), *(c.name for c in conversions)]))
        raise ValueError(
            f"report {names}: a file in it is not as smolseek writes it ({type(error).__name__}: {str(error)[:200]}); "
            "repair or remove it"
        ) from error


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")

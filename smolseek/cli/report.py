"""The verb report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Report:
    """Draw runs and conversions, several in one chart, as one HTML file; with --png also as pictures."""

    folders: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs, finished or not, and converted folders."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """The HTML file."""
    png: bool = False
    """Write every chart as a PNG beside the HTML file."""
    force: bool = False
    """Replace existing files."""


def run_report(command: Report) -> None:
    from smolseek.reporting.report import write_report

    if not command.folders:
        raise ValueError("report: no folder named; name runs or converted folders")
    for path in write_report(command.folders, command.out, png=command.png, force=command.force):
        print(path)

"""report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Report:
    """Draw runs and conversions, several over one another, as one HTML file to look at, with --png as pictures."""

    folders: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs (also of ones that go on) and converted folders."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """The HTML file."""
    png: bool = False
    """Write every chart as a PNG beside it."""
    force: bool = False
    """Replace files that are there."""


def run_report(command: Report) -> None:
    from smolseek.reporting.report import write_report

    if not command.folders:
        raise ValueError("report: no folder named; name runs or converted folders")
    for path in write_report(command.folders, command.out, png=command.png, force=command.force):
        print(path)

"""Measurements as JSON lines, with which an interrupted benchmark goes on, and the report and plot beside them.

The first line of a file holds the settings of the benchmark.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers

from smolseek.reporting.png import check_matplotlib

Row = dict[str, Any]


class Rows:
    """The lines of DATE-NAME.jsonl in `folder`, from an earlier day if there are any.

    Args:
        about: the settings, a dataclass.
        free: its fields that do not change what is measured.

    Raises:
        ValueError: the lines there were measured with other settings.
    """

    def __init__(self, folder: Path, name: str, about: Any, free: tuple[str, ...]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        earlier = sorted(folder.glob(f"????-??-??-{name}.jsonl"))
        self.path = earlier[-1] if earlier else folder / f"{datetime.date.today()}-{name}.jsonl"
        tree = json.loads(json.dumps(dataclasses.asdict(about), default=str))
        asked = {key: value for key, value in tree.items() if key not in free}
        if not self.path.exists():
            self.path.write_text(json.dumps(asked) + "\n", encoding="utf-8")
        first, *self.rows = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
        changed = [key for key, value in asked.items() if first.get(key) != value]
        if changed:
            raise ValueError(
                f"{self.path.name}: was measured with another {changed[0]}; name another --out or delete it"
            )

    def add(self, **row: Any) -> None:
        """Keep one measurement, and print its perplexity if it has one."""
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")
        if "perplexity" in row:
            print(f"  {row['what']:40} perplexity {row['perplexity']:.3f}  {row['seconds'] or 0:.0f} s", flush=True)

    def find(self, **about: Any) -> list[Row]:
        """Returns the measurements with these values."""
        return [row for row in self.rows if about.items() <= row.items()]


def present(measure: Callable[[], tuple[Path, str, Callable[[Path], None] | None]], *, plots: bool = True) -> int:
    """Measure, write report and plot, print the report; returns the exit status, 2 for a user's mistake.

    `measure` returns the path of the JSON lines, the report, and a function that draws the plot at a path, or None.
    `plots` tells whether it draws, so that a missing matplotlib is reported before anything is measured.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        if plots:
            check_matplotlib()
        path, text, plot = measure()
        path.with_suffix(".md").write_text(text, encoding="utf-8")
        if plot is not None:
            plot(path.with_suffix(".png"))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text)
    return 0

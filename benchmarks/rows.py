"""Measurements as JSON lines behind a first line that says what of, and the report and plot beside them: how an
interrupted benchmark goes on."""

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
    """The lines NAME.jsonl of `about` (a dataclass) in `folder`, those of an earlier day where there are any.

    Args:
        free: fields of `about` that do not change what is measured.

    Raises:
        ValueError: lines of that name that measured something else.
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
        """Keep one measurement, and tell its perplexity if it has one."""
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")
        if "perplexity" in row:
            print(f"  {row['what']:40} perplexity {row['perplexity']:.3f}  {row['seconds'] or 0:.0f} s", flush=True)

    def find(self, **about: Any) -> list[Row]:
        """The measurements that agree with `about`."""
        return [row for row in self.rows if about.items() <= row.items()]


def present(measure: Callable[[], tuple[Path, str, Callable[[Path], None] | None]], *, plots: bool = True) -> int:
    """Write and print what `measure` gives: the path of the JSON lines, the report, and what draws the plot at a path
    (where it `plots`).

    The exit status: 2 for a user's mistake, said in one line.
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

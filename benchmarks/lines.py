"""Measurements as JSON lines beside their report, so that an interrupted benchmark goes on where it stopped."""

from __future__ import annotations

import dataclasses
import datetime
import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Lines:
    """The rows of results/DATE-KIND-NAME.jsonl: a first line of settings, then a measurement each.

    `settings` is a dataclass with `results` (the folder) and `out` (NAME); those of an earlier day are gone on with.

    Raises:
        ValueError: the rows there were measured with other settings.
    """

    def __init__(self, kind: str, settings: Any) -> None:
        settings.results.mkdir(parents=True, exist_ok=True)
        earlier = sorted(settings.results.glob(f"????-??-??-{kind}-{settings.out}.jsonl"))
        today = f"{datetime.date.today()}-{kind}-{settings.out}.jsonl"
        self.lines: Path = earlier[-1] if earlier else settings.results / today
        self.rows = self._read_rows(settings)

    def _read_rows(self, settings: Any) -> list[Row]:
        tree = json.loads(json.dumps(dataclasses.asdict(settings), default=str))
        about = {key: value for key, value in tree.items() if key not in ("results", "work")}
        if not self.lines.exists():
            self.lines.write_text(json.dumps(about) + "\n", encoding="utf-8")
        first, *rows = [json.loads(line) for line in self.lines.read_text(encoding="utf-8").splitlines()]
        changed = [key for key, value in about.items() if first.get(key) != value]
        if changed:
            raise ValueError(
                f"{self.lines.name}: was measured with another {changed[0]}; name another --out or delete it"
            )
        return rows

    def add(self, **row: Any) -> None:
        """Keep one measurement."""
        self.rows.append(row)
        with self.lines.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")
        print(f"  {row['what']:40} perplexity {row['perplexity']:.3f}  {row['seconds'] or 0:.0f} s", flush=True)

    def has(self, **row: Any) -> bool:
        """Whether such a measurement is there."""
        return any(row.items() <= done.items() for done in self.rows)

"""The log files of a run, logs.txt and metrics.jsonl; both can be rewound to the time of a checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from smolseek.training.trackers import Tracker, flatten

RULE = "-" * 80


class RunLog:
    """Appends to logs.txt and metrics.jsonl in a run's folder, and passes numbers to the trackers.

    A muted log does nothing. `track(step)` returns the trackers of a run that begins, or goes on, at `step`; it is
    called at the first metrics.
    """

    def __init__(
        self, folder: Path, *, muted: bool = False, track: Callable[[int], list[Tracker]] = lambda step: []
    ) -> None:
        self.muted, self._track = muted, track
        self._trackers: list[Tracker] | None = None
        self.paths = {"logs": folder / "logs.txt", "metrics": folder / "metrics.jsonl"}

    def line(self, text: str) -> None:
        """Append a line to logs.txt."""
        self._append("logs", text + "\n")

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Append a sample to logs.txt, between two rules, and to metrics.jsonl."""
        self.line(f"{RULE}\nSample at step {step} | Prompt: {prompt}\n{text}\n{RULE}")
        self.metrics(step, sample={"prompt": prompt, "text": text})

    def metrics(self, step: int, **values: Any) -> None:
        """Append a line to metrics.jsonl; its numbers go to the trackers too."""
        self._append("metrics", json.dumps({"step": step, **values}) + "\n")
        numbers = {} if self.muted else flatten(values)
        if numbers and self._trackers is None:
            self._trackers = self._track(step)
        for tracker in self._trackers or ():
            tracker.log(step, numbers)

    def close(self) -> None:
        """Close the trackers; the files are closed after every line."""
        for tracker in self._trackers or ():
            tracker.close()
        self._trackers = None

    def sizes(self) -> dict[str, int]:
        """Returns the bytes written so far, for `rewind`."""
        return {key: path.stat().st_size if path.exists() else 0 for key, path in self.paths.items()}

    def rewind(self, sizes: dict[str, int]) -> None:
        """Drop everything written after `sizes` was taken, so that a resumed run repeats no line."""
        for key, size in () if self.muted else sizes.items():
            if self.paths[key].exists() and self.paths[key].stat().st_size > size:
                os.truncate(self.paths[key], size)

    def _append(self, key: str, text: str) -> None:
        if self.muted:
            return
        try:
            with self.paths[key].open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise OSError(
                f"{self.paths[key]}: cannot be written ({error}); checkpoints are kept: free some space and go on with "
                "--resume"
            ) from error

"""What a run leaves to read: logs.txt in the described form and metrics.jsonl, both rewindable to a checkpoint."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

RULE = "-" * 80


class RunLog:
    """Appends to logs.txt and metrics.jsonl of a run's folder; nothing when muted."""

    def __init__(self, folder: Path, *, muted: bool = False) -> None:
        self.muted = muted
        self.paths = {"logs": folder / "logs.txt", "metrics": folder / "metrics.jsonl"}

    def line(self, text: str) -> None:
        """A line of logs.txt."""
        self._append("logs", text + "\n")

    def sample(self, step: int, prompt: str, text: str) -> None:
        """A sample between rules."""
        self.line(f"{RULE}\nSample at step {step} | Prompt: {prompt}\n{text}\n{RULE}")

    def metrics(self, **values: Any) -> None:
        """A line of metrics.jsonl."""
        self._append("metrics", json.dumps(values) + "\n")

    def sizes(self) -> dict[str, int]:
        """Bytes written so far, for `rewind`."""
        return {key: path.stat().st_size if path.exists() else 0 for key, path in self.paths.items()}

    def rewind(self, sizes: dict[str, int]) -> None:
        """Drop what was written after `sizes` was taken, so that a resumed run repeats no line."""
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

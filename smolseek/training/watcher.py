"""How a run speaks to whoever started it, and how it is asked to stop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


class Progress(NamedTuple):
    """What a step tells whoever watches the run."""

    step: int
    steps: int
    loss: float
    """0: the batch had nothing to learn."""
    held_out_loss: float | None
    tokens_per_second: float


@dataclass(frozen=True)
class Watcher:
    """Functions that a run calls: at each stage, after each step, to ask whether it should stop, and of a conversion
    how far each of its stages is (stage, done, count)."""

    on_stage: Callable[[str], None] = lambda stage: None
    on_step: Callable[[Progress], None] = lambda progress: None
    should_stop: Callable[[], bool] = lambda: False
    on_progress: Callable[[str, int, int], None] = lambda stage, done, count: None


class Interrupted(Exception):
    """The run was asked to stop; its state is saved."""

    def __init__(self, step: int, folder: Path) -> None:
        super().__init__(f"stopped after {step} steps; {folder} holds the state: go on with --resume")

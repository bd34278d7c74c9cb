"""Live metrics in TensorBoard, trackio or Weights & Biases; each is imported only if a recipe names it."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from smolseek.config import Recipe

PROJECT = "smolseek"
"""The project under which trackio and Weights & Biases list the runs."""


class Tracker(Protocol):
    """Shows the numbers of a run while it trains."""

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """Show the numbers of a step, by name."""

    def close(self) -> None:
        """Send all numbers that are not sent yet."""


class TensorBoard:
    """Event files in the run's folder; events of steps that a resumed run repeats are dropped."""

    def __init__(self, recipe: Recipe, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Trackio:
    """A run in trackio, which keeps it on this machine unless its own settings name another place."""

    def __init__(self, recipe: Recipe, folder: Path, step: int) -> None:
        name = f"{recipe.name}-{_run_id(folder)}"
        trackio = import_module("trackio")
        self._run = trackio.init(project=PROJECT, name=name, config=asdict(recipe), resume="allow", embed=False)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self._run.log(numbers, step=step)

    def close(self) -> None:
        self._run.finish()


class Wandb:
    """A run in Weights & Biases; with WANDB_MODE=offline it stays in the run's folder."""

    def __init__(self, recipe: Recipe, folder: Path, step: int) -> None:
        wandb = import_module("wandb")
        about = {"project": PROJECT, "name": recipe.name, "id": _run_id(folder), "resume": "allow"}
        try:
            self._run = wandb.init(dir=str(folder), config=asdict(recipe), **about)
        except wandb.Error as error:
            raise ValueError(f"train.trackers wandb: {error}; run wandb login, or set WANDB_MODE=offline") from error

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self._run.log(numbers, step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[Recipe, Path, int], Tracker]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": Wandb,
}


def check_trackers(recipe: Recipe) -> None:
    """Refuse trackers that are not installed (ValueError)."""
    for name in recipe.train.trackers:
        if find_spec(name) is None:
            raise ValueError(f"train.trackers {name}: not installed; run pip install 'smolseek[{name}]'")


def open_trackers(recipe: Recipe, folder: Path, step: int) -> list[Tracker]:
    """Returns the recipe's trackers, for the run in `folder` that begins or goes on at `step`.

    Raises:
        ValueError: a tracker refuses the run (no account, say).
    """
    return [TRACKERS[name](recipe, folder, step) for name in recipe.train.trackers]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Returns the numbers in nested values by their path; lists (such as expert loads), text and None are left out."""
    numbers: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            numbers |= flatten(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            numbers[f"{prefix}{key}"] = value
    return numbers


def _run_id(folder: Path) -> str:
    """Returns the id of the run in a service.

    It is drawn once and kept in the run's folder. A resumed run therefore goes on in the service; one that is started
    over is a new run there.
    """
    path = folder / "tracker-id"
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
    return path.read_text(encoding="utf-8")

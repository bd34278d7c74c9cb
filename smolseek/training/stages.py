"""The stages of a run: each has the run's settings with some fields changed, and may end early."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from smolseek.config import StageSettings, TrainSettings
from smolseek.training.optimizer import GROUPS


def stages_of(train: TrainSettings) -> tuple[TrainSettings, ...]:
    """Returns the settings of each stage; `train` itself is the only stage where it lists none.

    Raises:
        ValueError: a value that no stage can have.
    """
    if train.stages and train.steps != TrainSettings().steps:
        raise ValueError(f"train.steps {train.steps}: the stages have lengths of their own; leave it out, set theirs")
    stages = tuple(_settings_of(stage, train) for stage in train.stages) or (train,)
    for number, stage in enumerate(stages):
        _check(stage, f"train.stages.{number}" if train.stages else "train")
    return stages


def learning_rate_name(train: TrainSettings, index: int) -> str:
    """Returns the name of the setting from which a stage has its learning rate."""
    own = bool(train.stages) and train.stages[index].learning_rate is not None
    return f"train.stages.{index}.learning_rate" if own else "train.learning_rate"


def step_tokens(settings: TrainSettings) -> int:
    """Returns the number of tokens predicted in one optimizer step."""
    return settings.batch_windows * settings.gradient_accumulation * settings.window_tokens


def _settings_of(stage: StageSettings, train: TrainSettings) -> TrainSettings:
    """Returns `train` with the fields that the stage sets, and its length in steps."""
    if (stage.steps is None) == (stage.tokens is None):
        raise ValueError(
            f"train.stages: a stage of steps {stage.steps} and tokens {stage.tokens}; give it one of the two"
        )
    changes = {field.name: getattr(stage, field.name) for field in dataclasses.fields(stage)}
    tokens = changes.pop("tokens")
    if tokens is not None:
        changes["steps"] = math.ceil(tokens / step_tokens(train))
    return dataclasses.replace(train, stages=(), **{k: v for k, v in changes.items() if v is not None})


_AT_LEAST: tuple[tuple[str, float], ...] = (
    *((name, 1) for name in ("steps", "batch_windows", "gradient_accumulation", "window_tokens", "patience")),
    *((name, 1) for name in ("evaluate_every", "checkpoint_every", "log_every", "keep_last")),
    *((name, 0) for name in ("learning_rate", "final_learning_rate_share", "warmup_steps", "weight_decay")),
    *((name, 0) for name in ("spike_factor", "max_skipped_steps", "balance_update_speed", "balance_loss_weight")),
    ("distill_steps", 0),
)
"""The least value of settings that have no other bound."""


def _check(stage: TrainSettings, where: str) -> None:
    """Refuse values that no stage can have; `where` is the stage's key in the recipe."""
    for name, least in _AT_LEAST:
        value = getattr(stage, name)
        if value is not None and not least <= value < math.inf:
            raise ValueError(f"{where}.{name} {value}: must be at least {least}, and finite")
    for name in ("distill_weight", "decay_share", "balance_freeze_share"):
        if not 0 <= getattr(stage, name) <= 1:
            raise ValueError(f"{where}.{name} {getattr(stage, name)}: must be between 0 and 1")
    if not stage.clip_norm > 0:
        raise ValueError(f"{where}.clip_norm {stage.clip_norm}: must be above 0; inf clips nothing")
    if not 0 < stage.distill_temperature < math.inf:
        raise ValueError(f"{where}.distill_temperature {stage.distill_temperature}: must be above 0; 1 changes nothing")
    for group, factor in stage.learning_rate_factors.items():
        if group not in GROUPS:
            raise ValueError(f"{where}.learning_rate_factors.{group}: no such group; there are {', '.join(GROUPS)}")
        if not 0 <= factor < math.inf:
            raise ValueError(f"{where}.learning_rate_factors.{group} {factor}: must be 0 or more")


@dataclass
class StageProgress:
    """Which stage of a run is running and when it ends; steps are counted from the beginning of the run."""

    settings_of_each: tuple[TrainSettings, ...]
    """The settings of every stage, from `stages_of`."""
    index: int = 0
    """The running stage; the number of stages when the run is over."""
    start: int = 0
    """The step at which the running stage began."""
    best: float = math.inf
    """The lowest held-out loss in the running stage."""
    waited: int = 0
    """Evaluations in a row without a lower one."""

    @property
    def settings(self) -> TrainSettings:
        """The running stage's settings; the last stage's when the run is over."""
        return self.settings_of_each[min(self.index, len(self.settings_of_each) - 1)]

    @property
    def is_last(self) -> bool:
        """Whether the last stage is running."""
        return self.index == len(self.settings_of_each) - 1

    @property
    def done(self) -> bool:
        """Whether every stage has ended."""
        return self.index == len(self.settings_of_each)

    @property
    def steps(self) -> int:
        """Steps of the whole run, if no further stage ends early."""
        return self.start + sum(stage.steps for stage in self.settings_of_each[self.index :])

    def note_held_out_loss(self, loss: float) -> None:
        """Compare a new held-out loss with the stage's best, for its patience."""
        self.waited = 0 if loss < self.best else self.waited + 1
        self.best = min(self.best, loss)

    def ends(self, step: int) -> bool:
        """Returns whether the running stage is over after `step` steps, by its length or its patience."""
        patience = self.settings.patience
        return step - self.start >= self.settings.steps or (patience is not None and self.waited >= patience)

    def advance(self, step: int) -> None:
        """Begin the next stage at `step`."""
        self.index, self.start, self.best, self.waited = self.index + 1, step, math.inf, 0

    def state(self) -> dict[str, Any]:
        """Returns what `restore` needs, JSON-able."""
        return {name: getattr(self, name) for name in ("index", "start", "best", "waited")}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        vars(self).update(state)

    def reopen(self) -> None:
        """Let a run of one stage that has ended go on, because it was given more steps."""
        if self.done and len(self.settings_of_each) == 1:
            self.index, self.start, self.waited = 0, 0, 0

"""Checks of the training settings, and which of them a resumed run may change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from smolseek.config import Recipe
from smolseek.model import DeepseekV3, StockModel
from smolseek.training.stages import stages_of


def check_settings(model: DeepseekV3 | StockModel, recipe: Recipe, teacher: StockModel | None) -> None:
    """Refuse settings that cannot work, before anything runs (ValueError)."""
    settings, limit = recipe.train, model.config.max_position_embeddings
    stages = stages_of(settings)
    for name in ("evaluate_every", "checkpoint_every", "keep_last"):
        if getattr(settings, name) < 1:
            raise ValueError(f"train.{name} {getattr(settings, name)}: must be at least 1")
    if settings.window_tokens > limit:
        raise ValueError(f"train.window_tokens {settings.window_tokens}: the model's limit is {limit} positions")
    if teacher is None and any(stage.distill_weight for stage in stages):
        weight = max(stage.distill_weight for stage in stages)
        raise ValueError(f"train.distill_weight {weight}: no dense model to distil from; name a teacher")
    if teacher is not None and teacher.config.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"teacher with {teacher.config.vocab_size} vocabulary entries for a model with {model.config.vocab_size}: "
            "they must share a tokenizer"
        )


_FREE = {"train.checkpoint_every", "train.log_every", "train.keep_last", "train.trackers"}
"""Settings that do not change a run's results."""
_STEERING = {"train.learning_rate", "train.clip_norm", "train.spike_factor", "train.max_skipped_steps"}
"""Settings that a resumed run may change, for example to get past a spike; logs.txt names the change."""


def changed_settings(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Returns the names and values of settings that differ and that a resumed run may not change."""
    return ", ".join(
        f"{name} {was!r} then, {now!r} now" for name, was, now in _differences(old, new, _FREE | _STEERING)
    )


def changed_steering(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Returns a line for each changed setting that a resumed run may change."""
    return [f"{name} {now!r} (was {was!r})" for name, was, now in _differences(old, new, _FREE) if name in _STEERING]


def _differences(old: dict[str, Any], new: dict[str, Any], free: set[str]) -> Iterator[tuple[str, Any, Any]]:
    """Yields (name, old value, new value) of the settings that differ."""
    pairs = [
        (f"{part}.{key}", old[part].get(key), value) for part in ("data", "train") for key, value in new[part].items()
    ]
    pairs.append(("seed", old["seed"], new["seed"]))
    return ((name, was, now) for name, was, now in pairs if name not in free and was != _plain(now))


def _plain(value: Any) -> Any:
    """Returns the value as JSON gives it back."""
    return list(value) if isinstance(value, tuple) else value

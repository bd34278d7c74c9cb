"""Which training settings cannot work, and which of them a resumed run may not change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from smolseek.config import Recipe
from smolseek.model import DeepseekV3, StockModel
from smolseek.training.stages import stages_of


def check_settings(model: DeepseekV3 | StockModel, recipe: Recipe, teacher: StockModel | None) -> None:
    """Refuse settings that cannot work, before anything runs."""
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
"""Settings that do not matter to the numbers of a run."""
_STEERING = {"train.learning_rate", "train.clip_norm", "train.spike_factor", "train.max_skipped_steps"}
"""Settings that may be changed on the way, to get a run past a bad place; logs.txt says so."""


def changed_settings(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Names of settings that differ and matter to the numbers of a run."""
    return ", ".join(
        f"{name} {was!r} then, {now!r} now" for name, was, now in _differences(old, new, _FREE | _STEERING)
    )


def steered(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """A line for each steering setting that was changed."""
    return [f"{name} {now!r} (was {was!r})" for name, was, now in _differences(old, new, _FREE) if name in _STEERING]


def _differences(old: dict[str, Any], new: dict[str, Any], free: set[str]) -> Iterator[tuple[str, Any, Any]]:
    """(name, was, now) of settings that differ."""
    pairs = [
        (f"{room}.{key}", old[room].get(key), value) for room in ("data", "train") for key, value in new[room].items()
    ]
    pairs.append(("seed", old["seed"], new["seed"]))
    return ((name, was, now) for name, was, now in pairs if name not in free and was != _plain(now))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value

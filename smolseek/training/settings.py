"""Checks of the training settings, and which of them a resumed run may change."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from smolseek.config import SELF, Recipe, SampleSettings, TrainSettings
from smolseek.data.drawing import held_out_text
from smolseek.data.encoding import check_same_tokens, check_vocabulary, encode_prompt
from smolseek.data.packing import Packed
from smolseek.data.sources import open_sources
from smolseek.data.stream import WindowStream
from smolseek.generation import Sampling
from smolseek.model import DeepseekV3, StockModel


def check_settings(model: DeepseekV3 | StockModel, recipe: Recipe, teacher: StockModel | None) -> None:
    """Refuse settings that cannot work, before anything runs (ValueError)."""
    _check_windows(recipe, model.config)
    check_distillation(recipe.train, teaches=teacher is not None)
    if teacher is not None:
        _check_entries(teacher.config.vocab_size, model.config.vocab_size)


def check_distillation(train: TrainSettings, *, teaches: bool) -> None:
    """Refuse to distil where no dense model teaches (ValueError)."""
    if train.most_distill_weight and not teaches:
        raise ValueError(
            f"train.distill_weight {train.most_distill_weight}: no dense model to distil from; name a teacher"
        )


def _check_windows(recipe: Recipe, config: Any) -> None:
    window, limit = recipe.train.window_tokens, config.max_position_embeddings
    if window > limit:
        raise ValueError(f"train.window_tokens {window}: the model's limit is {limit} positions")


def _check_entries(teacher_entries: int, entries: int) -> None:
    if teacher_entries != entries:
        raise ValueError(
            f"teacher with {teacher_entries} vocabulary entries for a model with {entries}: they must share a tokenizer"
        )


def check_inputs(recipe: Recipe, tokenizer: Any, config: Any) -> Packed:
    """Returns the held-out text of a run, after refusing whatever would end the run later.

    `config` is a transformers config with the model's positions and vocabulary.

    Raises:
        ValueError: text that is missing, empty or cannot be mixed, windows that the model does not read, samples that
            it cannot draw, or a tokenizer with tokens that the model does not have.
    """
    _check_windows(recipe, config)
    _check_samples(recipe.sample, tokenizer, config.max_position_embeddings, config.vocab_size)
    if recipe.convert:
        open_sources((name for name in recipe.convert.calibration if name != SELF), recipe.data)
    stream = WindowStream(tokenizer, recipe.data, window_tokens=recipe.train.window_tokens + 1, seed=recipe.seed)
    for tokens_T in stream.first_tokens():
        check_vocabulary(tokens_T, config.vocab_size)
    held_out = held_out_text(tokenizer, recipe.data)
    if len(held_out.ids_T) < 2 or not held_out.counts_T.any():
        raise ValueError(
            f"held-out text: none found in {', '.join(recipe.data.held_out or recipe.data.train)}; name some with "
            "data.held_out, set data.separator to what parts the documents, or raise data.held_out_share"
        )
    check_vocabulary(held_out.ids_T, config.vocab_size)
    return held_out


def _check_samples(sample: SampleSettings, tokenizer: Any, positions: int, vocab_size: int) -> None:
    Sampling(temperature=sample.temperature, top_p=sample.top_p, repetition_penalty=sample.repetition_penalty)
    for name, least in (("every", 0), ("max_new_tokens", 1)):
        if getattr(sample, name) < least:
            raise ValueError(f"sample.{name} {getattr(sample, name)}: must be at least {least}")
    for prompt in sample.prompts:
        ids = encode_prompt(tokenizer, prompt, chat=sample.chat)
        if not 1 <= len(ids) < positions:
            shown = f"{prompt[:40]!r}{'...' if len(prompt) > 40 else ''}"
            raise ValueError(
                f"sample.prompts {shown}: {len(ids)} tokens; the model takes 1 to {positions - 1}, name another"
            )
        check_vocabulary(torch.tensor(ids), vocab_size)


def check_teacher(teacher_entries: int, teacher_tokenizer: Any, entries: int, tokenizer: Any) -> None:
    """Refuse a teacher whose vocabulary is not the model's, by size or by token (ValueError)."""
    _check_entries(teacher_entries, entries)
    check_same_tokens("teacher", teacher_tokenizer, tokenizer)


_FREE = {"train.checkpoint_every", "train.log_every", "train.keep_last", "train.trackers"}
"""Settings that do not change a run's results."""
_STEERING = {"train.learning_rate", "train.clip_norm", "train.spike_factor", "train.max_skipped_steps"}
"""Settings that a resumed run may change, also those of a stage, for example to get past a spike; logs.txt names the
change."""
_SHOWN_FILES = 3
_START = ("source", "convert", "model", "tokenizer", "train_tokenizer_entries")
"""What a run starts from."""


def changed_start(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Returns the names and values of what a run starts from, of two recipes as mappings, where they differ."""
    pairs = _pairs(old, new, _START)
    return _described((name, was, now) for name, was, now in pairs if was != now)


def changed_settings(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Returns the names and values of settings that differ and that a resumed run may not change; it may have more
    steps."""
    differing = _differences(old, new, _FREE | _STEERING)
    return _described(change for change in differing if change[0] != "train.steps" or change[2] < change[1])


def _described(changes: Iterable[tuple[str, Any, Any]]) -> str:
    return ", ".join(f"{name} {was!r} then, {now!r} now" for name, was, now in changes)


def changed_steering(old: dict[str, Any], new: dict[str, Any], stage: int) -> list[str]:
    """Returns a line for each changed setting that a resumed run may change.

    `stage` is the number of the running stage. A line says where the change has no effect.
    """
    return [
        f"{name} {now!r} (was {was!r}){_without_effect(name, new['train'], stage)}"
        for name, was, now in _differences(old, new, _FREE)
        if _of_any_stage(name) in _STEERING | {"train.steps"}
    ]


def with_steering(recipe: Recipe, old: dict[str, Any]) -> Recipe:
    """Returns the recipe with those settings that a resumed run may change as they were in another, a mapping."""
    names = [name.removeprefix("train.") for name in _STEERING]
    train, was = recipe.train, old["train"]
    stages = tuple(
        dataclasses.replace(stage, learning_rate=fields["learning_rate"])
        for stage, fields in zip(train.stages, was.get("stages", ()), strict=True)
    )
    kept = {name: was[name] for name in names if name in was}
    return dataclasses.replace(recipe, train=dataclasses.replace(train, stages=stages, **kept))


def changed_files(old: dict[str, int], new: dict[str, int]) -> str:
    """Returns words on local text that changed, given the bytes of its files by path; none if none did."""
    changes = [
        f"{path} had {old.get(path, 'no')} bytes and has {new.get(path, 'none')}"
        for path in sorted(old.keys() | new.keys())
        if old.get(path) != new.get(path)
    ]
    return ", ".join(changes[:_SHOWN_FILES]) + (", ..." if len(changes) > _SHOWN_FILES else "")


def _without_effect(name: str, train: dict[str, Any], stage: int) -> str:
    """Returns words on what a changed learning rate does not change, if there is anything."""
    if name.startswith("train.stages."):
        return "" if int(name.split(".")[2]) >= stage else ", of a stage that has ended"
    rates = [stage["learning_rate"] for stage in train["stages"]] if name == "train.learning_rate" else []
    own = [f"train.stages.{number}.learning_rate {rate!r}" for number, rate in enumerate(rates) if rate is not None]
    return f", which does not change {', '.join(own)}" if own else ""


def _differences(old: dict[str, Any], new: dict[str, Any], free: set[str]) -> list[tuple[str, Any, Any]]:
    """Returns (name, old value, new value) of the settings that differ."""
    pairs = _pairs(old, new, (*_START, "teacher", "data", "train", "seed"))
    return [(name, was, now) for name, was, now in pairs if _of_any_stage(name) not in free and was != now]


def _pairs(old: dict[str, Any], new: dict[str, Any], parts: Iterable[str]) -> Iterator[tuple[str, Any, Any]]:
    """Yields (name, old value, new value) of settings as JSON gives them back, each field of a part or stage.

    A field that an older recipe lacks did not exist then, and is passed over.
    """
    old, new = json.loads(json.dumps([old, new]))
    for part in parts:
        was, now = old.get(part), new.get(part)
        if isinstance(was, dict) and isinstance(now, dict) and part != "model":
            was = _fields(part, was)
            yield from ((name, was[name], value) for name, value in _fields(part, now).items() if name in was)
        elif part in old:
            yield part, was, now


def _fields(part: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of a recipe's part by their full names; of the stages their number, and the fields of each."""
    fields = {f"{part}.{key}": value for key, value in settings.items()}
    stages = fields.get("train.stages", ())
    for number, stage in enumerate(stages):
        fields |= {f"train.stages.{number}.{key}": value for key, value in stage.items()}
    return fields | ({"train.stages": len(stages)} if "train.stages" in fields else {})


def _of_any_stage(name: str) -> str:
    """Returns a setting's name without the number of its stage."""
    return re.sub(r"^train\.stages\.\d+\.", "train.", name)

"""What a conversion will give and cost, from a source's config.json alone."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from smolseek.config import ConvertSettings, TrainSettings
from smolseek.conversion.target import target_config
from smolseek.formats import deepseek_v3
from smolseek.formats.dense import read_source
from smolseek.formats.runtimes import check, verdict
from smolseek.machine import Machine
from smolseek.planning.decoding import DECODED_SEQUENCES, Decoding, count_sequences
from smolseek.planning.memory import TrainingMemory, convert_bytes, training_memory
from smolseek.planning.seconds import convert_seconds, heal_seconds
from smolseek.planning.shapes import ModelSize, source_shape, target_shape


@dataclass(frozen=True)
class Cost:
    """Estimated time and peak memory."""

    seconds: float
    memory_bytes: int


@dataclass(frozen=True)
class Plan:
    """A conversion before it runs; `stages` are the seconds of the conversion's parts."""

    source: ModelSize
    target: ModelSize
    cache_share: float
    max_context_tokens: int
    decoding: tuple[Decoding, ...]
    convert: Cost
    stages: dict[str, float]
    heal: Cost
    heal_tokens: int
    processes: int
    heal_memory: TrainingMemory
    machine: Machine
    profile: str
    runtimes: dict[str, str]
    config: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, for JSON."""
        return dataclasses.asdict(self)


def plan(
    source_config: dict[str, Any],
    settings: ConvertSettings,
    machine: Machine,
    *,
    heal_tokens: int = 10_000_000,
    train: TrainSettings | None = None,
    processes: int = 1,
) -> Plan:
    """Returns what converting this config.json under `settings`, and healing for `heal_tokens`, gives and costs.

    Healing is by `train` (the defaults, if none) in so many processes, each on a machine or GPU like this one.

    Raises:
        ValueError: as `read_source` and `target_config`, transformers cannot run experts of this hidden size, or the
            processes cannot share the windows of a micro-batch.
    """
    train = train or _default_training(processes)
    if processes < 1 or train.batch_windows % processes:
        raise ValueError(
            f"processes {processes}: train.batch_windows, {train.batch_windows}, must be a multiple of it; use another"
        )
    dense_source = read_source(source_config)
    config = target_config(dense_source, settings)
    deepseek_v3.check_strides(config)
    source, target = source_shape(dense_source), target_shape(config)
    stages = convert_seconds(dense_source, source, target, settings, machine)
    memory = training_memory(config, train, processes, machine, teacher=source_config)
    return Plan(
        source=source.size(),
        target=target.size(),
        cache_share=target.cache_bytes / source.cache_bytes,
        max_context_tokens=source.context,
        decoding=tuple(count_sequences(source, target, machine, sequences) for sequences in DECODED_SEQUENCES),
        convert=Cost(sum(stages.values()), convert_bytes(dense_source, source, target, settings, machine)),
        stages=stages,
        heal=Cost(heal_seconds(target, machine, heal_tokens, train.window_tokens) / processes, memory.total),
        heal_tokens=heal_tokens,
        processes=processes,
        heal_memory=memory,
        machine=machine,
        profile="transformers" if settings.exact else settings.profile,
        runtimes={runtime: verdict(findings) for runtime, findings in check(config).items()},
        config=config,
    )


def _default_training(processes: int) -> TrainSettings:
    """Returns the default settings, with as few windows more as the processes can share."""
    most = TrainSettings().batch_windows
    return TrainSettings(batch_windows=most + -most % max(1, processes))

"""One conversion before it runs: everything read and checked, nothing computed."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from smolseek.checkpoint.atomic import check_space, refuse_existing, refuse_inputs, remove_leftovers
from smolseek.checkpoint.folder import TensorFolder, foreign_files, written_bytes
from smolseek.checkpoint.hub import check_stock
from smolseek.checkpoint.source import pinned, read_config, resolve_folder
from smolseek.config import SELF, ConvertSettings, DataSettings, check_fields
from smolseek.conversion.sizes import distill_steps, refine_steps, unnamed_text
from smolseek.conversion.source_weights import check_tensors
from smolseek.conversion.target import target_config
from smolseek.formats.deepseek_v3 import check_strides, expected_tensors
from smolseek.formats.dense import DenseSource, read_source
from smolseek.numerics.precision import check_device
from smolseek.numerics.shares import ALONE, Shares

log = logging.getLogger(__name__)

OnProgress = Callable[[str, int, int], None]
"""Told (stage, done, count)."""


@dataclass(frozen=True)
class Job:
    """What a conversion starts from, and what it will write."""

    name: str
    """The source as the user named it."""
    folder: Path
    """The source's folder."""
    out: Path
    force: bool
    settings: ConvertSettings
    device: torch.device
    config: dict[str, Any]
    """The source's config.json."""
    source: DenseSource
    target: dict[str, Any]
    """The config.json to write; the fit of the rope slots may still change its rope base."""
    tensors: TensorFolder
    refine_steps: int
    distill_steps: int
    data: DataSettings
    """How the calibration text is read."""
    on_progress: OnProgress
    """Told in the leading process."""
    shares: Shares
    """This process's share of the work."""

    @property
    def calibrates(self) -> bool:
        """Whether text is needed: not for the exact form, unless experts are made."""
        return not self.settings.exact or self.carves or self.upcycles

    @property
    def carves(self) -> bool:
        """Whether the dense neurons are divided among experts."""
        return self.settings.experts == "carve"

    @property
    def upcycles(self) -> bool:
        """Whether the dense MLPs are copied into experts."""
        return self.settings.experts == "upcycle"

    @property
    def refines_attention(self) -> bool:
        """Whether converted attention blocks are trained; exact ones have nothing to learn."""
        return bool(self.refine_steps) and not self.settings.exact

    def with_target(self, rope_theta: float) -> Job:
        """Returns the job with the rope base that the fit found."""
        target = target_config(self.source, self.settings, rope_theta=rope_theta)
        return dataclasses.replace(self, target=target)


def read_job(
    source: str | Path,
    out: Path,
    settings: ConvertSettings,
    *,
    data: DataSettings | None = None,
    device: str,
    force: bool,
    on_progress: OnProgress,
    shares: Shares = ALONE,
) -> Job:
    """Returns a conversion that can run; reads the source's config.json and all its tensors once.

    `data` says how calibration text is read; None: as the settings say, whole files. Where text is needed and neither
    names any, the model writes it, and builtin:prose is the other half of a large source's.

    Raises:
        ValueError: the source is missing, unsupported, broken or refused by transformers, the settings do not fit it,
            `out` exists and `force` is not set or its disk has too little room, or the device is not there or not for
            several processes.
    """
    check_device(device)
    if shares.size > 1 and device.partition(":")[0] == "mps":
        raise ValueError(f"device mps: {shares.size} processes cannot share their sums there; use one process, or cpu")
    check_fields(settings)
    name = pinned(source)
    folder = resolve_folder(name)
    if shares.leads:
        remove_leftovers(out.parent, out.name)
    _check_out(out, force, [folder, name, *(text for text in settings.calibration if text != SELF)])
    config = read_config(folder)
    dense = read_source(config)
    check_stock(folder)
    tensors = TensorFolder(folder)
    if dense.tie_word_embeddings and tensors.has_own_head():
        dense = dataclasses.replace(dense, tie_word_embeddings=False)
    target = target_config(dense, settings)
    check_strides(target)
    if shares.leads:
        _warn_of_another_share(dense, settings, target)
    settings = _with_text(settings, dense, data)
    job = Job(
        name=name,
        folder=folder,
        out=out,
        force=force,
        settings=settings,
        device=torch.device(device),
        config=config,
        source=dense,
        target=target,
        tensors=tensors,
        refine_steps=refine_steps(dense, settings),
        distill_steps=distill_steps(dense, settings),
        data=data or calibration_data(settings),
        on_progress=on_progress if shares.leads else _tell_nobody,
        shares=shares,
    )
    check_tensors(tensors, dense, attention_bias=target["attention_bias"])
    _check_room(out, target)
    return job


def _with_text(settings: ConvertSettings, dense: DenseSource, data: DataSettings | None) -> ConvertSettings:
    """Returns the settings with the text that is read where they name none."""
    if settings.calibration or (settings.exact and settings.experts == "none"):
        return settings
    return dataclasses.replace(settings, calibration=data.train if data and data.train else unnamed_text(dense))


def _check_room(out: Path, target: dict[str, Any]) -> None:
    """Refuse an output folder that its disk has no room for (ValueError)."""
    numbers = sum(math.prod(shape) for shape in expected_tensors(target).values())
    there = next(folder for folder in out.resolve().parents if folder.is_dir())
    remedy = "for the converted weights; free some space, or name a folder on another disk"
    check_space(there, written_bytes(numbers * getattr(torch, target["dtype"]).itemsize), remedy)


def _tell_nobody(stage: str, done: int, count: int) -> None:
    pass


def calibration_data(settings: ConvertSettings) -> DataSettings:
    """Returns how calibration text is read where no run says it: nothing is held out but builtin:python's share."""
    return DataSettings(
        train=settings.calibration,
        weights=settings.calibration_weights,
        separator=settings.separator,
        held_out_share=0.0,
    )


def _warn_of_another_share(dense: DenseSource, settings: ConvertSettings, target: dict[str, Any]) -> None:
    """Say so where the profile's sizes keep another share of the cache than was asked for."""
    rank, rope_dim = target["kv_lora_rank"], target["qk_rope_head_dim"]
    kept = (rank + rope_dim) / dense.cache_numbers
    if settings.cache is not None and settings.profile == "vllm" and abs(kept - settings.cache) > 0.05:
        told = "cache %g: of vLLM's sizes the nearest is %d + %d numbers, which keeps %.1f%% of the cache"
        log.warning(told, settings.cache, rank, rope_dim, 100 * kept)


def _check_out(out: Path, force: bool, inputs: list[str | Path]) -> None:
    """Refuse an output that would remove something else than a conversion (ValueError)."""
    refuse_inputs(out, inputs)
    if (source := Path(inputs[0])).is_dir() and source.resolve() in out.resolve().parents:
        raise ValueError(f"{out}: lies in the source {source}; name a folder outside it")
    if not out.exists():
        return
    if not (out / "conversion.json").is_file():
        raise ValueError(
            f"{out}: is there, and stays: --force replaces only a folder that convert wrote, with a conversion.json; "
            "name another"
        )
    if foreign := foreign_files(out):
        raise ValueError(
            f"{out}: --force would remove {', '.join(foreign[:3])}, which convert did not write; move it away"
        )
    refuse_existing(out, force)

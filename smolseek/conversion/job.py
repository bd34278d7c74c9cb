"""One conversion before it runs: everything read and checked, nothing computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from smolseek.checkpoint.atomic import refuse_existing
from smolseek.checkpoint.folder import TensorFolder
from smolseek.checkpoint.hub import check_stock
from smolseek.checkpoint.source import read_config, resolve_folder
from smolseek.config import ConvertSettings
from smolseek.conversion.sizes import distill_steps
from smolseek.conversion.source_weights import check_tensors
from smolseek.conversion.target import target_config
from smolseek.formats.deepseek_v3 import check_strides
from smolseek.formats.dense import DenseSource, read_source
from smolseek.numerics.precision import check_device

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
    distill_steps: int
    on_progress: OnProgress

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
        return bool(self.settings.refine_steps) and not self.settings.exact

    def with_target(self, rope_theta: float) -> Job:
        """Returns the job with the rope base that the fit found."""
        target = target_config(self.source, self.settings, rope_theta=rope_theta)
        return dataclasses.replace(self, target=target)


def read_job(
    source: str | Path, out: Path, settings: ConvertSettings, *, device: str, force: bool, on_progress: OnProgress
) -> Job:
    """Returns a conversion that can run; reads the source's config.json and all its tensors once.

    Raises:
        ValueError: the source is missing, unsupported, broken or refused by transformers, the settings do not fit it,
            there is no calibration text, `out` exists and `force` is not set, or the device is not there.
    """
    check_device(device)
    folder = resolve_folder(source)
    config = read_config(folder)
    dense = read_source(config)
    refuse_existing(out, force)
    check_stock(folder)
    tensors = TensorFolder(folder)
    if dense.tie_word_embeddings and tensors.has_own_head():
        dense = dataclasses.replace(dense, tie_word_embeddings=False)
    target = target_config(dense, settings)
    check_strides(target)
    steps = distill_steps(dense, settings)
    job = Job(
        name=str(source),
        folder=folder,
        out=out,
        force=force,
        settings=settings,
        device=torch.device(device),
        config=config,
        source=dense,
        target=target,
        tensors=tensors,
        distill_steps=steps,
        on_progress=on_progress,
    )
    if job.calibrates and not settings.calibration:
        raise ValueError(
            "calibration: none given, and the low-rank cut is weighed by it; name text files or builtin:python"
        )
    check_tensors(job.tensors, dense, attention_bias=target["attention_bias"])
    return job

"""Writing a converted folder: every tensor under its stock name, config.json, conversion.json, the card, the tokenizer.

Shapes: B windows, T tokens in each, D hidden_size, g copies of an upcycled MLP.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smolseek import __version__
from smolseek.card import Card
from smolseek.checkpoint.atomic import atomic_file
from smolseek.checkpoint.folder import FolderWriter
from smolseek.checkpoint.hub import copy_generation_config, copy_tokenizer, named_disk_tensors
from smolseek.checkpoint.licence import licence_fields
from smolseek.checkpoint.source import commit_of, read_json
from smolseek.conversion.collect import collect_mlp_inputs
from smolseek.conversion.fit import exact_block
from smolseek.conversion.job import Job
from smolseek.conversion.sizes import ATTENTION_FIELDS
from smolseek.conversion.student import layers_of
from smolseek.conversion.upcycle import balancing_bias, router_rows, upcycle
from smolseek.formats.deepseek_v3 import cache_numbers
from smolseek.model import DeepseekV3
from smolseek.numerics.rounding import rounded

_ROUTER_TOKENS = 4096
_MLP = ("gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a conversion measured, for conversion.json."""

    calibration: dict[str, Any]
    losses: dict[str, float]
    """On the judged windows, by stage."""
    layers: list[dict[str, Any]]
    """Errors of each layer."""
    folds: tuple[tuple[int, ...], ...] | None
    """Source frequencies in each rope slot."""


def write_folder(job: Job, tensors: Iterator[tuple[str, Tensor]], facts: Facts, *, began: float) -> None:
    """Write the folder, tensor by tensor; `began` is `time.perf_counter()` at the start.

    Raises:
        ValueError: a number is not finite in the dtype of the folder.
    """
    with FolderWriter(job.out, force=job.force) as writer:
        for name, tensor in tensors:
            keep_fp32 = name.endswith("e_score_correction_bias")
            written = rounded(tensor, torch.float32 if keep_fp32 else getattr(torch, job.target["dtype"]))
            if not written.isfinite().all():
                raise ValueError(
                    f"{name}: NaN or infinite as {job.target['dtype']}; save the source in another dtype and convert it"
                )
            writer.add(name, written)
        report = conversion_report(job, facts, time.perf_counter() - began)
        writer.write_json("config.json", job.target)
        writer.write_json("conversion.json", report)
        writer.write_text("README.md", _card(job, job.target, report))
        copy_tokenizer(writer, job.folder)
        copy_generation_config(writer, job.folder)
        writer.copy_licence(job.folder)


def add_judged(job: Job, judged: list[dict[str, Any]]) -> None:
    """Write what `judge_folder` found into conversion.json and the card of the written folder."""
    report = read_json(job.out / "conversion.json") | {"judged": judged}
    texts = {
        "conversion.json": json.dumps(report, indent=2, sort_keys=True) + "\n",
        "README.md": _card(job, read_json(job.out / "config.json"), report),
    }
    for name, text in texts.items():
        with atomic_file(job.out / name, force=True) as file:
            file.write_text(text, encoding="utf-8")


def _card(job: Job, config: dict[str, Any], report: dict[str, Any]) -> str:
    return Card(job.out.name, config, licence_fields(job.folder), report).render()


def exact_tensors_of_source(job: Job) -> Iterator[tuple[str, Tensor]]:
    """Returns the exact form without experts, each source tensor read when its turn comes."""
    for name in job.source.tensors():
        layer, is_attention, part = name.partition(".self_attn.")
        if not is_attention:
            yield name, job.tensors.get(name)
        elif part == "q_proj.weight":
            for converted, tensor in exact_block(job, int(layer.rpartition(".")[2])).items():
                yield f"{layer}.self_attn.{converted}", tensor


def student_tensors(job: Job, student: DeepseekV3, windows_BT: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Returns the student's tensors, dense MLPs copied into experts if the job upcycles.

    `windows_BT` are the calibration windows whose MLP inputs the routers spread over the copies.
    """
    routers = _routers(job, student, windows_BT) if job.upcycles else []
    for name, tensor in named_disk_tensors(student):
        layer, is_mlp, part = name.partition(".mlp.")
        index = int(layer.rpartition(".")[2]) if is_mlp else 0
        if not (routers and is_mlp) or index < job.target["first_k_dense_replace"]:
            yield name, tensor
        elif part == "gate_proj.weight":
            mlp = layers_of(student)[index].mlp
            weights = {projection: getattr(mlp, projection).weight for projection in _MLP}
            for expert, expert_tensor in upcycle(weights, job.target, *routers[index]):
                yield f"{layer}.mlp.{expert}", expert_tensor


def conversion_report(job: Job, facts: Facts, seconds: float) -> dict[str, Any]:
    """Returns conversion.json."""
    source, target = job.source, job.target
    before = source.num_hidden_layers * source.cache_numbers
    after = source.num_hidden_layers * cache_numbers(target)
    source_bytes, target_bytes = (getattr(torch, dtype).itemsize for dtype in (source.dtype, target["dtype"]))
    settings, (name, commit) = dataclasses.asdict(job.settings), commit_of(job.name)
    if Path(name).exists():
        name = str(Path(name).resolve())  # a path means the same from everywhere, and is never taken for a hub id
    return {
        "source": name,
        "source_commit": commit,
        "settings": {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()},
        **{field: target[field] for field in (*ATTENTION_FIELDS, "rope_theta")},
        "rope_slots": None if facts.folds is None else [list(fold) for fold in facts.folds],
        "cache": {
            "source_numbers_per_token": before,
            "source_bytes_per_token": before * source_bytes,
            "numbers_per_token": after,
            "bytes_per_token": after * target_bytes,
        },
        "calibration": facts.calibration,
        "losses": facts.losses,
        "layers": facts.layers,
        "refine_steps": job.refine_steps,
        "distill_steps": job.distill_steps,
        "versions": {"smolseek": __version__, **{name: version(name) for name in ("torch", "transformers")}},
        "seconds": round(seconds, 3),
    }


def _routers(job: Job, student: DeepseekV3, windows_BT: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Returns for each layer router rows and bias that spread the student's own MLP inputs evenly over the copies."""
    copies, dtype = job.target["n_group"], getattr(torch, job.target["dtype"])
    generator = torch.Generator().manual_seed(job.settings.seed)
    routers = []
    for inputs_BTD in collect_mlp_inputs(student, windows_BT, _ROUTER_TOKENS):
        rows_gD = router_rows(inputs_BTD, copies, generator).to(dtype)  # balanced as they will be written
        routers.append((rows_gD, balancing_bias(inputs_BTD.flatten(0, 1), rows_gD.float())))
    return routers

"""The conversion, folder to folder: calibrate → fit → refine → distill → write → judge, each stage a function."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from smolseek import __version__
from smolseek.checkpoint.hub import load_stock
from smolseek.config import ConvertSettings, DataSettings
from smolseek.conversion.calibrate import Calibration, NamedText, read_calibration, read_named_text
from smolseek.conversion.distill import distill_model
from smolseek.conversion.fit import FittedAttention, exact_block, fit_attention
from smolseek.conversion.job import Job, OnProgress, read_job
from smolseek.conversion.judge import judge_folder, read_judged
from smolseek.conversion.refine import refine_layers
from smolseek.conversion.student import assemble, mean_loss
from smolseek.conversion.work_folder import WorkFolder
from smolseek.conversion.write import Facts, add_judged, exact_tensors_of_source, student_tensors, write_folder
from smolseek.model import DeepseekV3, StockModel
from smolseek.numerics.memory import keep_freed_memory, release_memory
from smolseek.numerics.shares import ALONE, Shares


def convert(
    source: str | Path,
    out: str | Path,
    *,
    settings: ConvertSettings | None = None,
    data: DataSettings | None = None,
    judge: str | Path | Iterable[str | Path] = (),
    device: str = "cpu",
    force: bool = False,
    on_progress: OnProgress = lambda stage, done, count: None,
    shares: Shares = ALONE,
    **fields: Any,
) -> Path:
    """Write the DeepSeek-V3 form of a Llama-family checkpoint, a stock folder, and return its path.

    `fields` are those of `ConvertSettings`, in place of or on top of `settings`; `calibration` may be one name or
    several. `data` says how that text is read and what of it is held out, where it is a run's training text. `judge`
    names texts, one or several, that nothing is learnt from: when `out` is there, it is measured on them beside the
    dense folder. `device` (cpu, cuda or mps) is where it computes. Every refusal comes before anything heavy runs, and
    `out` is complete or absent. A conversion that ends early leaves its finished layers beside `out`, and the same call
    goes on from there. `on_progress(stage, done, count)` tells how far it is.

    Several processes convert together when each calls this with its `shares`. All must see the file system of `out`,
    and the leading process alone writes it. A refusal is raised in all, as `FailedElsewhere` in those that need not
    tell it.

    Raises:
        TypeError: a field that `ConvertSettings` does not have.
        ValueError: the source is missing, unsupported or broken, the settings do not fit it, a calibration text is too
            short or not there, a text to judge by is missing, too short or calibration text too, the device is not
            there, or `out` exists and `force` is not set; with `force`, `out` is no conversion or holds what is read.
    """
    began = time.perf_counter()
    if "calibration" in fields:
        fields["calibration"] = _names(fields["calibration"])
    settings = dataclasses.replace(settings or ConvertSettings(), **fields)
    job = shares.after_leader(
        lambda: read_job(
            source,
            Path(out),
            settings,
            data=data,
            device=device,
            force=force,
            on_progress=on_progress,
            shares=shares,
        )
    )
    texts = shares.by_leader(lambda: read_judged(job, _names(judge)))
    _write(job, began)  # its models are gone when others are loaded
    if texts:
        shares.by_leader(lambda: add_judged(job, judge_folder(job, texts)))
    return job.out


def _names(names: str | Path | Iterable[str | Path]) -> tuple[str, ...]:
    """Returns one name or several as text."""
    return (str(names),) if isinstance(names, str | Path) else tuple(map(str, names))


def _write(job: Job, began: float) -> None:
    """Convert and write the folder."""
    if not job.calibrates:
        facts = Facts({}, {}, _numbered(job), None)
        job.shares.by_leader(lambda: write_folder(job, exact_tensors_of_source(job), facts, began=began))
        return
    text = job.shares.by_leader(lambda: read_named_text(job))
    with WorkFolder(job.out, _fingerprint(job, text), job.shares) as work:
        work.check_seen()
        calibration = read_calibration(job, text, work)
        job, student, facts = _make_student(job, calibration, work)
        tensors = student_tensors(job, student, calibration.moments_BT)
        job.shares.by_leader(lambda: write_folder(job, tensors, facts, began=began))


def _make_student(job: Job, calibration: Calibration, work: WorkFolder) -> tuple[Job, DeepseekV3, Facts]:
    """Returns the converted model, all but upcycled experts, with the job's final target and what was measured."""
    dense = load_stock(job.folder, device=str(job.device)).model.requires_grad_(False)

    def judged_loss(model: DeepseekV3 | StockModel) -> float:
        return job.shares.by_leader(lambda: mean_loss(model, calibration.judged_BT))

    losses = {"dense": judged_loss(StockModel(dense))}
    layers = _numbered(job)
    if job.settings.exact:
        blocks, folds = [exact_block(job, index) for index in range(len(layers))], None
    else:
        fitted: FittedAttention = fit_attention(job, dense, calibration, work)
        blocks, folds = fitted.layers, fitted.folds
        job = job.with_target(fitted.rope_theta)
        _extend(layers, fitted.errors)
    student = assemble(dense, job.target, blocks)
    if not job.carves:  # whose MLPs are the dense ones yet
        losses["closed_form"] = judged_loss(student)
    keep_freed_memory()
    states = None
    if job.carves or job.refines_attention:
        errors, states = refine_layers(job, student, dense, calibration, work)
        _extend(layers, errors)
        release_memory()  # the residual stream's, kept for it until here
        losses["refined" if job.refine_steps else "closed_form"] = judged_loss(student)
    if job.distill_steps and (job.carves or not job.settings.exact):
        loss = distill_model(job, student, dense, calibration, states)
        losses |= {} if loss is None else {"distilled": loss}
    return job, student, Facts(calibration.facts, losses, layers, folds)


def _numbered(job: Job) -> list[dict[str, Any]]:
    """Returns an empty record for each layer."""
    return [{"layer": index} for index in range(job.source.num_hidden_layers)]


def _extend(layers: list[dict[str, Any]], facts: list[dict[str, Any]]) -> None:
    for layer, more in zip(layers, facts, strict=True):
        layer |= more


def _fingerprint(job: Job, text: NamedText) -> dict[str, Any]:
    """Returns everything that the finished parts depend on, text that the model writes among them."""
    folder = job.folder.resolve()
    files = [path.stat() for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")])]
    return {
        "settings": dataclasses.asdict(job.settings),
        "source": [str(folder), job.config, [(f.st_size, f.st_mtime_ns) for f in files]],
        "calibration": text.facts,
        "version": __version__,
    }

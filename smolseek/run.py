"""A recipe from start to end: source, conversion, training, comparison, table; in one folder that can be resumed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import platform
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from smolseek import __version__
from smolseek.card import Card, Training
from smolseek.checkpoint.atomic import atomic_file
from smolseek.checkpoint.hub import load, load_stock, load_tokenizer
from smolseek.checkpoint.licence import licence_fields
from smolseek.checkpoint.source import read_config, read_conversion, resolve_folder
from smolseek.config import Recipe
from smolseek.conversion.pipeline import convert
from smolseek.conversion.target import target_config
from smolseek.formats.deepseek_v3 import disk_config
from smolseek.formats.dense import read_source
from smolseek.model import DeepseekV3, StockModel
from smolseek.numerics.precision import compute_dtype
from smolseek.summary import render_summary, summarize
from smolseek.training.processes import Processes, join_processes, restarted_by_torchrun
from smolseek.training.stages import stages_of
from smolseek.training.start import corpus_tokenizer, random_model
from smolseek.training.trackers import check_trackers
from smolseek.training.trainer import Trainer
from smolseek.training.watcher import Watcher


def run_recipe(
    recipe: Recipe,
    folder: Path,
    *,
    device: str = "cpu",
    resume: bool = False,
    force: bool = False,
    watcher: Watcher = Watcher(),  # noqa: B008  (frozen)
) -> dict[str, Any]:
    """Run `recipe` in `folder` and return its summary, which is also written to summary.json.

    Raises:
        ValueError: settings or inputs that cannot work, or a folder that exists without `resume` or `force`.
        Interrupted: the watcher said stop; the state was saved first.
    """
    check_recipe(recipe)
    resume = resume or restarted_by_torchrun()
    with join_processes(recipe.parallel, device) as (processes, own_device):
        with processes.leader_first():  # it downloads, converts and clears away; the others find that done
            _prepare_folder(recipe, folder, resume, force, processes)
            model, tokenizer = _load_start(recipe, folder, own_device, watcher)
        return _train_and_compare(recipe, folder, model.to(own_device), tokenizer, resume, watcher, processes)


def _prepare_folder(recipe: Recipe, folder: Path, resume: bool, force: bool, processes: Processes) -> None:
    """Check that what the recipe names exists and fits, and only then make the run's folder in place of an old one."""
    for source in filter(None, (recipe.source, recipe.teacher, recipe.tokenizer)):
        resolve_folder(source)
    if recipe.convert and recipe.source:
        dense = read_source(read_config(resolve_folder(recipe.source)))
        target_config(dense, recipe.convert)  # raises for sizes that do not fit
    if not processes.leads:
        return
    if folder.exists() and not (resume or force):
        raise ValueError(f"{folder}: exists already; pass --resume to go on with it, or --force to start over")
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    versions = {"smolseek": __version__, "python": platform.python_version()}
    versions |= {name: version(name) for name in ("torch", "transformers")}
    about = {"recipe": dataclasses.asdict(recipe), "versions": versions, "processes": processes.size}
    _write_json(folder / "run.json", about)


def _write_json(path: Path, tree: Any) -> None:
    _write(path, json.dumps(tree, indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    with atomic_file(path, force=True) as file:
        file.write_text(text, encoding="utf-8")


def _train_and_compare(
    recipe: Recipe,
    folder: Path,
    model: DeepseekV3 | StockModel,
    tokenizer: Any,
    resume: bool,
    watcher: Watcher,
    processes: Processes,
) -> dict[str, Any]:
    """Train the model and, if the recipe says so, the dense source; write and return the summary."""
    device = str(next(model.parameters()).device)
    dense = recipe.teacher or (recipe.source if recipe.convert else None)
    teacher = None
    if dense and any(stage.distill_weight for stage in stages_of(recipe.train)):
        teacher = load_stock(dense, dtype=compute_dtype(torch.device(device), recipe.train.precision), device=device)
    trainer = Trainer(model, tokenizer, recipe, folder, teacher=teacher, processes=processes)
    _fit(trainer, "heal" if recipe.convert else "train", resume, watcher)
    origin, trained = _starting_folder(recipe, folder), "healed" if recipe.convert else "trained"
    folders = {trained: trainer.save_model("model", _card(trainer, origin), origin=origin)}
    if recipe.convert and recipe.source:
        folders = {"dense": resolve_folder(recipe.source), "converted": folder / "converted"} | folders
        if recipe.compare_dense:
            folders["dense_trained"] = _train_dense(trainer, resume, watcher)
    watcher.on_stage("measure every model on held-out text, through stock transformers")
    summary: dict[str, Any] = {}
    if processes.leads:
        summary = summarize(folders, trainer)
        losses = {name: summary[name]["loss"] for name in folders}
        _write(folders[trained] / "README.md", _card(trainer, origin, losses))
        _write_json(folder / "summary.json", summary)
        trainer.log.line(render_summary(summary))
    return processes.from_leader(summary)


def check_recipe(recipe: Recipe) -> None:
    """Refuse recipes that name no starting model, or two, and training settings that no run can have (ValueError)."""
    stages_of(recipe.train)
    check_trackers(recipe)
    if bool(recipe.source) == bool(recipe.model):
        raise ValueError("recipe: name either source (a checkpoint) or model (random weights), and not both")
    if recipe.model and recipe.convert:
        raise ValueError("recipe: convert needs a source checkpoint, and model asks for random weights; drop one")
    if recipe.model and not (recipe.tokenizer or recipe.train_tokenizer_entries):
        raise ValueError("recipe: random weights need a tokenizer; set tokenizer or train_tokenizer_entries")


def _load_start(recipe: Recipe, folder: Path, device: str, watcher: Watcher) -> tuple[DeepseekV3 | StockModel, Any]:
    """Returns the model to train and its tokenizer; converts the source first if the recipe says so."""
    if recipe.source is None:
        tokenizer = load_tokenizer(recipe.tokenizer) if recipe.tokenizer else corpus_tokenizer(recipe)
        return random_model(recipe, tokenizer), tokenizer
    source = resolve_folder(recipe.source)
    tokenizer = load_tokenizer(recipe.tokenizer or source)
    if recipe.convert is None:
        return load(source), tokenizer
    out = folder / "converted"
    if not out.exists():
        watcher.on_stage(f"convert {recipe.source} to DeepSeek-V3")
        calibration = recipe.convert.calibration or recipe.data.train
        reported: list[str] = []

        def on_progress(stage: str, done: int, count: int) -> None:
            if stage not in reported:
                reported.append(stage)
                watcher.on_stage(f"convert: {stage}")

        settings = dataclasses.replace(recipe.convert, calibration=calibration)
        convert(recipe.source, out, settings=settings, device=device, on_progress=on_progress)
    return load(out), tokenizer


def _fit(trainer: Trainer, verb: str, resume: bool, watcher: Watcher) -> None:
    """Train to the end, from the last checkpoint if the run is resumed; `verb` says to the watcher what is done."""
    resumed = resume and trainer.resume()
    watcher.on_stage(f"{verb}: steps {trainer.step} to {trainer.stages.steps}" + (" (resumed)" if resumed else ""))
    with contextlib.closing(trainer.log):
        trainer.fit(watcher)


def _train_dense(healed: Trainer, resume: bool, watcher: Watcher) -> Path:
    """Train the dense source on the same tokens in the same order, for comparison; returns its folder.

    All its weights train, in one stage, by cross-entropy alone.
    """
    recipe = healed.recipe
    assert recipe.source is not None
    control = dataclasses.replace(
        recipe,
        name=f"{recipe.name}-dense",
        train=dataclasses.replace(
            recipe.train, distill_weight=0.0, steps=healed.step, stages=(), trains="all", patience=None
        ),
        sample=dataclasses.replace(recipe.sample, every=0),
    )
    model = load_stock(recipe.source, device=str(healed.device))
    trainer = Trainer(model, healed.tokenizer, control, healed.folder / "dense", processes=healed.processes)
    _fit(trainer, "train the dense source on the same tokens", resume, watcher)
    origin = resolve_folder(recipe.source)
    return trainer.save_model("model", _card(trainer, origin), origin=origin)


def _starting_folder(recipe: Recipe, folder: Path) -> Path | None:
    """Returns the checkpoint that training starts from; None for random weights."""
    if recipe.source is None:
        return None
    return folder / "converted" if recipe.convert else resolve_folder(recipe.source)


def _card(trainer: Trainer, origin: Path | None, losses: dict[str, float] | None = None) -> str:
    """Returns the model card of a trained folder.

    `losses` has the held-out losses of the compared models by name; without it, the card has the trained model's only.
    """
    recipe, quality, config = trainer.recipe, trainer.quality, trainer.model.config.to_dict()
    own = {"trained": quality.loss} if quality else {}
    training = Training(recipe, trainer.step, trainer.trained_tokens, losses or own)
    tree = disk_config(config) if isinstance(trainer.model, DeepseekV3) else config
    licence, conversion = (licence_fields(origin), read_conversion(origin)) if origin else ({}, None)
    return Card(recipe.name, tree, licence, conversion, training).render()

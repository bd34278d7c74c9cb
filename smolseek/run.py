"""The whole road of a recipe: source → convert → heal → compare → table, in one folder that can be resumed."""

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
from smolseek.checkpoint.hub import load, load_for_evaluation, load_stock, load_tokenizer
from smolseek.checkpoint.licence import licence_fields
from smolseek.checkpoint.source import read_config, read_conversion, resolve_folder
from smolseek.config import Recipe
from smolseek.conversion.pipeline import convert
from smolseek.conversion.target import target_config
from smolseek.evaluation import measure_balance, measure_decode_speed
from smolseek.formats.deepseek_v3 import count_parameters, disk_config
from smolseek.formats.dense import read_source
from smolseek.generation import continue_text, repetition_rate
from smolseek.model import DeepseekV3, StockModel
from smolseek.numerics.precision import teacher_dtype
from smolseek.planning import cache_bytes_per_token
from smolseek.training.loop import Trainer, Watcher
from smolseek.training.parallel import Alone, join, restarted
from smolseek.training.stages import stages_of
from smolseek.training.start import corpus_tokenizer, random_model
from smolseek.training.trackers import check_trackers


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
    resume = resume or restarted()
    with join(recipe.parallel, device) as (processes, own_device):
        with processes.in_turn():  # what one process fetches, converts or clears away the others find so
            _prepare(recipe, folder, resume, force, processes)
            model, tokenizer = _start(recipe, folder, watcher)
        return _travel(recipe, folder, model.to(own_device), tokenizer, resume, watcher, processes)


def _prepare(recipe: Recipe, folder: Path, resume: bool, force: bool, processes: Alone) -> None:
    """Look for what the recipe needs, and make the run's folder."""
    for source in filter(None, (recipe.source, recipe.teacher, recipe.tokenizer)):
        resolve_folder(source)  # what must be there is looked for before an old run is thrown away
    if recipe.convert and recipe.source:
        target_config(
            read_source(read_config(resolve_folder(recipe.source))), recipe.convert
        )  # and sizes that do not fit
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


def _travel(
    recipe: Recipe,
    folder: Path,
    model: DeepseekV3 | StockModel,
    tokenizer: Any,
    resume: bool,
    watcher: Watcher,
    processes: Alone,
) -> dict[str, Any]:
    """Training, the control, and the summary."""
    device = str(next(model.parameters()).device)
    dense = recipe.teacher or (recipe.source if recipe.convert else None)
    teacher = None
    if dense and any(stage.distill_weight for stage in stages_of(recipe.train)):
        teacher = load_stock(dense, dtype=teacher_dtype(torch.device(device), recipe.train.precision), device=device)
    trainer = Trainer(model, tokenizer, recipe, folder, teacher=teacher, processes=processes)
    _fit(trainer, "heal" if recipe.convert else "train", resume, watcher)
    origin, trained = _origin(recipe, folder), "healed" if recipe.convert else "trained"
    rows = {trained: trainer.save_model("model", _card(trainer, origin), origin=origin)}
    if recipe.convert and recipe.source:
        rows = {"dense": resolve_folder(recipe.source), "converted": folder / "converted"} | rows
        if recipe.compare_dense:
            rows["dense_trained"] = _train_dense(trainer, resume, watcher)
    watcher.on_stage("measure every model on held-out text, through stock transformers")
    summary: dict[str, Any] = {}
    if processes.leads:
        summary = summarize(rows, trainer)
        losses = {name: summary[name]["loss"] for name in rows}
        _write(rows[trained] / "README.md", _card(trainer, origin, losses))
        _write_json(folder / "summary.json", summary)
        trainer.log.line(table(summary))
    return processes.share(summary)


def check_recipe(recipe: Recipe) -> None:
    """Refuse recipes that name no start, or two, and training settings that no run can have."""
    stages_of(recipe.train)
    check_trackers(recipe)
    if bool(recipe.source) == bool(recipe.model):
        raise ValueError("recipe: name either source (a checkpoint) or model (random weights), and not both")
    if recipe.model and recipe.convert:
        raise ValueError("recipe: convert needs a source checkpoint, and model asks for random weights; drop one")
    if recipe.model and not (recipe.tokenizer or recipe.train_tokenizer_entries):
        raise ValueError("recipe: random weights need a tokenizer; set tokenizer or train_tokenizer_entries")


def _start(recipe: Recipe, folder: Path, watcher: Watcher) -> tuple[DeepseekV3 | StockModel, Any]:
    """The model to train and its tokenizer; converts the source first when the recipe says so."""
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
        told: list[str] = []

        def on_progress(stage: str, done: int, count: int) -> None:
            if stage not in told:
                told.append(stage)
                watcher.on_stage(f"convert: {stage}")

        settings = dataclasses.replace(recipe.convert, calibration=calibration)
        convert(recipe.source, out, settings=settings, on_progress=on_progress)
    return load(out), tokenizer


def _fit(trainer: Trainer, verb: str, resume: bool, watcher: Watcher) -> None:
    resumed = resume and trainer.resume()
    watcher.on_stage(f"{verb}: steps {trainer.step} to {trainer.course.steps}" + (" (resumed)" if resumed else ""))
    with contextlib.closing(trainer.log):
        trainer.fit(watcher)


def _train_dense(healed: Trainer, resume: bool, watcher: Watcher) -> Path:
    """The control: the dense source trained whole on the same tokens in the same order, by cross-entropy."""
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


def _origin(recipe: Recipe, folder: Path) -> Path | None:
    """The folder that the run starts from."""
    if recipe.source is None:
        return None
    return folder / "converted" if recipe.convert else resolve_folder(recipe.source)


def _card(trainer: Trainer, origin: Path | None, losses: dict[str, float] | None = None) -> str:
    """The model card of a trained folder; `losses` on held-out text by model, else the trained model's own alone."""
    recipe, quality, config = trainer.recipe, trainer.quality, trainer.model.config.to_dict()
    own = {"trained": quality.loss} if quality else {}
    training = Training(recipe, trainer.step, trainer.step * trainer.step_tokens, losses or own)
    tree = disk_config(config) if isinstance(trainer.model, DeepseekV3) else config
    licence, conversion = (licence_fields(origin), read_conversion(origin)) if origin else ({}, None)
    return Card(recipe.name, tree, licence, conversion, training).render()


# -- the table --------------------------------------------------------------------------------------------------------


def summarize(rows: dict[str, Path], trainer: Trainer) -> dict[str, Any]:
    """Per folder: held-out quality through stock transformers, sizes, decode speed, a sample; MaxVio of the last V3."""
    summary: dict[str, Any] = {}
    for name, folder in rows.items():
        model = load(folder, device=str(trainer.device))
        summary[name] = _measure(model, folder, trainer)
        if isinstance(model, DeepseekV3) and name != "converted":
            maxvio = measure_balance(model, trainer.held_out.ids_T)
            summary["maxvio_per_layer"] = {str(layer): round(value, 4) for layer, value in maxvio.items()}
            summary["maxvio"] = max(summary["maxvio_per_layer"].values(), default=None)
    summary["trained_tokens"] = trainer.step * trainer.step_tokens
    summary["held_out_tokens"] = len(trainer.held_out.ids_T)
    return summary


def _measure(model: DeepseekV3 | StockModel, folder: Path, trainer: Trainer) -> dict[str, Any]:
    stock = load_for_evaluation(folder, device=str(trainer.device))
    quality = trainer.measure(stock)
    sample = trainer.recipe.sample
    samples = {prompt: continue_text(model, trainer.tokenizer, prompt, sample) for prompt in sample.prompts}
    ids = next(iter(samples.values()))[1]
    config = model.config.to_dict()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    total, active = count_parameters(config) if isinstance(model, DeepseekV3) else (parameters, parameters)
    prompt_T = trainer.held_out.ids_T[: min(128, model.config.max_position_embeddings // 2)]
    return {
        **quality.to_dict(),
        "cache_bytes_per_token": cache_bytes_per_token(config),
        "total_parameters": total,
        "active_parameters": active,
        "decode_tokens_per_second": round(measure_decode_speed(model, prompt_T), 1),
        "samples": {prompt: text for prompt, (text, _) in samples.items()},
        "repetition_rate": round(repetition_rate(ids), 4),
    }


def table(summary: dict[str, Any]) -> str:
    """The summary as a text table with the samples under it."""
    rows = {name: row for name, row in summary.items() if isinstance(row, dict) and "loss" in row}
    head = (
        f"{'':14}{'loss':>8}{'perplexity':>12}{'cache B/token':>15}{'parameters':>12}{'active':>12}{'decode tok/s':>14}"
    )
    lines = [head]
    for name, row in rows.items():
        lines.append(
            f"{name.replace('_', ' '):14}{row['loss']:8.4f}{row['perplexity']:12.2f}{row['cache_bytes_per_token']:15,}"
            f"{row['total_parameters']:12,}{row['active_parameters']:12,}{row['decode_tokens_per_second']:14,.0f}"
        )
    if summary.get("maxvio") is not None:
        lines.append(
            f"MaxVio of the worst layer over {summary['held_out_tokens']:,} held-out tokens: {summary['maxvio']:.3f}"
        )
    for name, row in rows.items():
        sample = next(iter(row["samples"].values()))
        lines += ["", f"-- {name.replace('_', ' ')} (4-grams repeated: {row['repetition_rate']:.0%})", sample]
    return "\n".join(lines)

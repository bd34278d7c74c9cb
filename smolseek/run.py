"""A recipe from start to end: source, conversion, training, comparison, table; in one folder that can be resumed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch

from smolseek.card import Card, Training
from smolseek.checkpoint.atomic import LOCK, atomic_file, exclusive
from smolseek.checkpoint.hub import check_generation_config, load, load_config, load_stock, load_tokenizer
from smolseek.checkpoint.licence import licence_fields
from smolseek.checkpoint.source import read_config, read_conversion, resolve_folder
from smolseek.config import Recipe, check_data, check_fields
from smolseek.conversion.pipeline import convert
from smolseek.conversion.target import target_config
from smolseek.data.packing import Packed
from smolseek.formats.deepseek_v3 import disk_config, is_latent
from smolseek.formats.dense import read_source
from smolseek.formats.headers import read_headers
from smolseek.model import DeepseekV3, StockModel
from smolseek.model.balance import routers
from smolseek.model.skeleton import draw_weights
from smolseek.numerics.precision import compute_dtype
from smolseek.summary import render_summary, summarize
from smolseek.training.processes import Processes, join_processes, restarted_by_torchrun
from smolseek.training.run_folder import (
    RUN_FILE,
    check_folder,
    check_name,
    clear_folder,
    new_pins,
    pin_recipe,
    read_pins,
    write_about,
)
from smolseek.training.settings import check_distillation, check_inputs, check_teacher
from smolseek.training.stages import stages_of
from smolseek.training.start import corpus_tokenizer, random_skeleton
from smolseek.training.trackers import check_trackers
from smolseek.training.trainer import Trainer
from smolseek.training.watcher import Watcher


class Start(NamedTuple):
    """What a run starts from, and the text that it is measured on."""

    tokenizer: Any
    tokenizer_from: Path | None
    """The folder of the tokenizer; None: it was trained on the run's own text."""
    held_out: Packed
    random: DeepseekV3 | StockModel | None
    """The model of a run from random weights, without memory for them yet."""


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

    What can be known to fail is refused before anything is converted or removed. A finished conversion stays, whatever
    comes later.

    Raises:
        ValueError: settings or inputs that cannot work; a folder that exists without `resume` or `force`, that another
            process is at work in, or, with `force`, that no run made or that holds what is read.
        Interrupted: the watcher said stop; the state was saved first.
    """
    check_recipe(recipe)
    if resume and not folder.exists():
        there = ", ".join(sorted(path.parent.name for path in folder.parent.glob(f"*/{RUN_FILE}"))) or "none"
        raise ValueError(f"{folder}: no such run to resume; there are {there}")
    resume = resume or restarted_by_torchrun()
    with contextlib.ExitStack() as locked, join_processes(recipe.parallel, device) as (processes, own_device):
        fresh = not folder.exists()
        with processes.leader_first():  # it downloads and clears away; the others find that done
            if processes.leads:
                check_folder(folder, recipe, resume=resume, force=force)
            pins = new_pins(recipe) if processes.leads and not resume else read_pins(folder, recipe)
            recipe = pin_recipe(recipe, pins)
            start = _read_start(recipe)
            if processes.leads:
                locked.enter_context(exclusive(folder))
                if not resume:
                    clear_folder(folder)
                if not (folder / RUN_FILE).is_file():
                    write_about(folder, recipe, pins, processes.size)
        try:
            _convert(recipe, folder, own_device, watcher, processes)
            return _train_and_compare(recipe, folder, own_device, start, pins, resume, watcher, processes)
        except ValueError as error:
            if (folder / "converted").exists() and "--resume" not in str(error):
                raise ValueError(f"{error} (the conversion is kept: mend that and pass --resume)") from error
            if fresh and processes.leads and {path.name for path in folder.iterdir()} <= {LOCK, RUN_FILE}:
                shutil.rmtree(folder)  # so that the same command, mended, begins
            raise


def _write_json(path: Path, tree: Any) -> None:
    _write(path, json.dumps(tree, indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    with atomic_file(path, force=True) as file:
        file.write_text(text, encoding="utf-8")


def _train_and_compare(
    recipe: Recipe,
    folder: Path,
    device: str,
    start: Start,
    pins: dict[str, str],
    resume: bool,
    watcher: Watcher,
    processes: Processes,
) -> dict[str, Any]:
    """Train the model and, if the recipe says so, the dense source; write and return the summary."""
    trainer = _new_trainer(recipe, folder, device, start, processes)
    resumed = resume and trainer.resume()
    if resumed and processes.leads:
        write_about(folder, trainer.recipe, pins, processes.size)
        if not trainer.stages.done:  # of fewer steps
            (folder / "summary.json").unlink(missing_ok=True)
    _card(trainer).render()  # a conversion.json that gives no card is refused before the training
    _fit(trainer, "heal" if recipe.convert else "train", resumed, watcher)
    before, card = _before(recipe, folder, trainer.model), _card(trainer)
    trained = "healed" if before else "trained"
    folders = before | {trained: trainer.save_model("model", card.render())}
    trainer.release()
    if before and recipe.compare_dense:
        folders["dense_trained"] = _train_dense(trainer, recipe, before["dense"], resume, watcher)
    watcher.on_stage("measure every model on held-out text, through stock transformers")
    summary = summarize(folders, trainer)
    if processes.leads:
        losses = {name: summary[name]["loss"] for name in folders}
        _write(folders[trained] / "README.md", _with_losses(card, losses).render())
        _write_json(folder / "summary.json", summary)
        trainer.log.line(render_summary(summary))
    return processes.from_leader(summary)  # whose folder is complete then


def check_recipe(recipe: Recipe) -> None:
    """Refuse what no run can have: a name that is a path, no starting model or two, bad settings (ValueError)."""
    check_fields(recipe)
    check_name(recipe.name)
    check_data(recipe.data)
    stages_of(recipe.train)  # raises for values that no stage can have
    check_trackers(recipe)
    if bool(recipe.source) == bool(recipe.model):
        raise ValueError("recipe: name either source (a checkpoint) or model (random weights), and not both")
    if recipe.model and recipe.convert:
        raise ValueError("recipe: convert needs a source checkpoint, and model asks for random weights; drop one")
    if recipe.model and not (recipe.tokenizer or recipe.train_tokenizer_entries):
        raise ValueError("recipe: random weights need a tokenizer; set tokenizer or train_tokenizer_entries")
    if recipe.train_tokenizer_entries < 0:
        raise ValueError(f"train_tokenizer_entries {recipe.train_tokenizer_entries}: must not be negative")
    check_distillation(recipe.train, teaches=_dense(recipe) is not None)
    if recipe.compare_dense and recipe.model:
        raise ValueError("compare_dense true: random weights come from no dense model; set it to false")
    if recipe.compare_dense and not _dense(recipe):
        raise ValueError("compare_dense true: no dense model to compare with; name a teacher, or set it to false")


def _dense(recipe: Recipe) -> str | None:
    """Returns the dense checkpoint to distil from, if there is one."""
    return recipe.teacher or (recipe.source if recipe.convert else None)


def _read_start(recipe: Recipe) -> Start:
    """Returns all that a run starts from but weights that are to be loaded.

    Raises:
        ValueError: what the recipe names is not there, or does not fit: text, tokenizer, windows, samples, teacher,
            sizes of the conversion.
    """
    if recipe.source is None:
        tokenizer_from = resolve_folder(recipe.tokenizer) if recipe.tokenizer else None
        tokenizer = load_tokenizer(tokenizer_from) if tokenizer_from else corpus_tokenizer(recipe)
        if tokenizer_from:
            check_generation_config(tokenizer_from)  # it is copied at the end
        model = random_skeleton(recipe, tokenizer)
        return Start(tokenizer, tokenizer_from, check_inputs(recipe, tokenizer, model.config), model)
    source = resolve_folder(recipe.source)
    tokenizer_from = resolve_folder(recipe.tokenizer or source)
    tokenizer = load_tokenizer(tokenizer_from)
    check_generation_config(tokenizer_from)
    read_headers(source)  # raises for weights that are not there or cut short
    if recipe.convert:
        target_config(read_source(read_config(source)), recipe.convert)  # raises for sizes that do not fit
    config = load_config(source)
    if recipe.compare_dense and not recipe.convert and not is_latent(config.to_dict()):
        raise ValueError(f"compare_dense true: {recipe.source} is dense itself, and the run converts nothing; drop it")
    held_out = check_inputs(recipe, tokenizer, config)
    if recipe.teacher:
        teacher = resolve_folder(recipe.teacher)
        read_headers(teacher)
        check_teacher(load_config(teacher).vocab_size, load_tokenizer(teacher), config.vocab_size, tokenizer)
    return Start(tokenizer, tokenizer_from, held_out, None)


def _convert(recipe: Recipe, folder: Path, device: str, watcher: Watcher, processes: Processes) -> None:
    """Convert the source, by all processes together, if the recipe says so and it is not converted yet."""
    out = folder / "converted"
    if recipe.convert is None or processes.from_leader(out.exists()):
        return
    assert recipe.source is not None
    watcher.on_stage(f"convert {recipe.source} to DeepSeek-V3")
    reported: list[str] = []

    def on_progress(stage: str, done: int, count: int) -> None:
        if stage not in reported:
            reported.append(stage)
            watcher.on_stage(f"convert: {stage}")
        watcher.on_progress(stage, done, count)

    settings, data = recipe.conversion()
    convert(
        recipe.source,
        out,
        settings=settings,
        data=data,
        device=device,
        on_progress=on_progress,
        shares=processes.shares,
    )


def _starting_model(
    recipe: Recipe, folder: Path, device: str, start: Start, processes: Processes
) -> DeepseekV3 | StockModel:
    """Returns the model with random weights, the source, or its conversion, as the recipe says.

    Raises:
        ValueError: it has no experts, and the processes are to divide them.
    """
    if start.random is not None:
        model = draw_weights(start.random, recipe.seed, device=device, shard=processes.shard)
    else:
        assert recipe.source is not None
        source = folder / "converted" if recipe.convert else recipe.source
        model = load(source, device=device, shard=processes.shard)
    if recipe.parallel.expert > 1 and not routers(model):
        raise ValueError(f"parallel.expert {recipe.parallel.expert}: the model has no experts; leave it at 1")
    return model


def _new_trainer(recipe: Recipe, folder: Path, device: str, start: Start, processes: Processes) -> Trainer:
    """Returns the run's trainer, which alone holds the model and the teacher, so that it can release them."""
    model = _starting_model(recipe, folder, device, start, processes)
    teacher, dense = None, _dense(recipe)
    if dense and recipe.train.most_distill_weight:
        dtype = compute_dtype(torch.device(device), recipe.train.precision)
        teacher = load_stock(dense, dtype=dtype, device=device, shard=processes.shard)
    return Trainer(
        model,
        start.tokenizer,
        recipe,
        folder,
        teacher=teacher,
        held_out=start.held_out,
        origin=_starting_folder(recipe, folder),
        tokenizer_from=start.tokenizer_from,
        processes=processes,
    )


def _fit(trainer: Trainer, verb: str, resumed: bool, watcher: Watcher) -> None:
    """Train to the end; `verb` says to the watcher what is done."""
    watcher.on_stage(f"{verb}: steps {trainer.step} to {trainer.stages.steps}" + (" (resumed)" if resumed else ""))
    with contextlib.closing(trainer.log):
        trainer.fit(watcher)
    watcher.on_stage("write the model")


def _train_dense(healed: Trainer, recipe: Recipe, source: Path, resume: bool, watcher: Watcher) -> Path:
    """Train the dense model in `source` on the same tokens in the same order, for comparison; returns its folder.

    All its weights train, in one stage, by cross-entropy alone.
    """
    control = dataclasses.replace(
        recipe,
        name=f"{recipe.name}-dense",
        train=dataclasses.replace(
            recipe.train, distill_weight=0.0, steps=healed.step, stages=(), trains="all", patience=None
        ),
        sample=dataclasses.replace(recipe.sample, every=0),
    )
    model = load_stock(source, device=str(healed.device), shard=healed.processes.shard)
    trainer = Trainer(
        model,
        healed.tokenizer,
        control,
        healed.folder / "dense",
        held_out=healed.held_out,
        origin=source,
        tokenizer_from=healed.tokenizer_from,
        processes=healed.processes,
    )
    _fit(trainer, "train the dense source on the same tokens", resume and trainer.resume(), watcher)
    return trainer.save_model("model", _card(trainer).render())


def _starting_folder(recipe: Recipe, folder: Path) -> Path | None:
    """Returns the checkpoint that training starts from; None for random weights."""
    if recipe.source is None:
        return None
    return folder / "converted" if recipe.convert else resolve_folder(recipe.source)


def _before(recipe: Recipe, folder: Path, model: DeepseekV3 | StockModel) -> dict[str, Path]:
    """Returns the folders of the dense model and of its conversion, which the healed model is compared with.

    Returns nothing if the run converts nothing and its source is no conversion or comes without a teacher.
    """
    dense, converted = recipe.source if recipe.convert else recipe.teacher, _starting_folder(recipe, folder)
    if dense is None or converted is None or not isinstance(model, DeepseekV3):
        return {}
    return {"dense": resolve_folder(dense), "converted": converted}


def _card(trainer: Trainer) -> Card:
    """Returns the model card of a trained folder, with the held-out loss of the trained model only."""
    recipe, quality, config, origin = trainer.recipe, trainer.quality, trainer.model.config.to_dict(), trainer.origin
    losses = {"trained": quality.loss} if quality else {}
    training = Training(recipe, trainer.step, trainer.trained_tokens, losses)
    tree = disk_config(config) if isinstance(trainer.model, DeepseekV3) else config
    licence, conversion = (licence_fields(origin), read_conversion(origin)) if origin else ({}, None)
    return Card(recipe.name, tree, licence, conversion, training)


def _with_losses(card: Card, losses: dict[str, float]) -> Card:
    """Returns the card with the held-out losses of the compared models by name."""
    assert card.training is not None
    return dataclasses.replace(card, training=dataclasses.replace(card.training, held_out_losses=losses))

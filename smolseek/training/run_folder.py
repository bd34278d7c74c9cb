"""The folder of a run: whether it may be used, what it says about the run, and which commits the run reads.

run.json is written when a run begins. Only a folder that has one is ever removed.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from smolseek import __version__
from smolseek.checkpoint.atomic import LOCK, atomic_file, refuse_inputs
from smolseek.checkpoint.source import pinned, read_json
from smolseek.checkpoint.state import newest_state
from smolseek.config import Recipe
from smolseek.data.sources.hub import pinned_spec
from smolseek.formats.fields import shown
from smolseek.training.settings import changed_start

RUN_FILE = "run.json"
_LONGEST_NAME = 200  # bytes: file systems take 255, and the names of unfinished files are longer than what they become


def check_name(name: str) -> None:
    """Raises ValueError unless a run's name is one plain path component."""
    is_plain = name not in ("", ".", "..") and name == Path(name).name and not any(letter in name for letter in "\\\0")
    if not is_plain or len(name.encode("utf-8", "replace")) > _LONGEST_NAME:
        raise ValueError(
            f"name {shown(name)}: is the name of a folder under runs/; use letters, digits, - and _, no path, and at "
            f"most {_LONGEST_NAME} of them"
        )


def check_folder(folder: Path, recipe: Recipe, *, resume: bool, force: bool) -> None:
    """Raises ValueError if a run may not begin, or go on, in a folder."""
    if not folder.exists():
        return
    if resume:
        _check_start(folder, recipe)
        return
    refuse_inputs(folder, _inputs(recipe))
    if not (folder / RUN_FILE).is_file() and {path.name for path in folder.iterdir()} - {LOCK}:
        raise ValueError(
            f"{folder}: exists, and is no run's folder, which has a {RUN_FILE}; move it away, or name the run otherwise"
        )
    if not force:
        raise ValueError(f"{folder}: exists already; pass --resume to go on with it, or --force to start over")


def _check_start(folder: Path, recipe: Recipe) -> None:
    """Refuse to go on from other weights than the recipe's, once there are any (ValueError)."""
    begun = (folder / "converted").exists() or newest_state(folder / "checkpoints")
    if not (begun and (folder / RUN_FILE).is_file()):
        return
    begun_with, pins = _read_about(folder)
    if changed := changed_start(begun_with, dataclasses.asdict(pin_recipe(recipe, pins))):
        raise ValueError(f"{folder}: begun with other settings ({changed}); use those, or start over with --force")


def clear_folder(folder: Path) -> None:
    """Remove everything in the folder of an earlier run but its lock, which the new run holds."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def write_about(folder: Path, recipe: Recipe, pins: dict[str, str], processes: int) -> None:
    """Write run.json: the recipe, the commits of what came from the hub, versions, the number of processes."""
    versions = {"smolseek": __version__, "python": platform.python_version()}
    versions |= {name: version(name) for name in ("torch", "transformers")}
    about = {"recipe": dataclasses.asdict(recipe), "pins": pins, "versions": versions, "processes": processes}
    with atomic_file(folder / RUN_FILE, force=True) as file:
        file.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def new_pins(recipe: Recipe) -> dict[str, str]:
    """Returns for each hub name in a recipe the name with its present commit, which the whole run then reads."""
    checkpoints = filter(None, (recipe.source, recipe.teacher, recipe.tokenizer))
    pins = {name: pinned(name) for name in checkpoints} | {spec: pinned_spec(spec) for spec in _texts(recipe)}
    return {name: pin for name, pin in pins.items() if pin != name}


def read_pins(folder: Path, recipe: Recipe) -> dict[str, str]:
    """Returns what `new_pins` did when the run began, from run.json; new ones if there is none."""
    return _read_about(folder)[1] if (folder / RUN_FILE).is_file() else new_pins(recipe)


def _read_about(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns the recipe and the pins of run.json; raises ValueError if they are no mappings."""
    about = read_json(folder / RUN_FILE)
    recipe, pins = about.get("recipe", {}), about.get("pins", {})
    if not (isinstance(recipe, dict) and isinstance(pins, dict) and all(isinstance(pin, str) for pin in pins.values())):
        raise ValueError(
            f"{folder / RUN_FILE}: its recipe or pins are not as smolseek writes them; restore the file, or start over "
            "with --force"
        )
    return recipe, pins


def pin_recipe(recipe: Recipe, pins: dict[str, str]) -> Recipe:
    """Returns a recipe with its hub names replaced by those with a commit."""

    def pin(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(pins.get(name, name) for name in names)

    convert = recipe.convert and dataclasses.replace(recipe.convert, calibration=pin(recipe.convert.calibration))
    data = dataclasses.replace(recipe.data, train=pin(recipe.data.train), held_out=pin(recipe.data.held_out))
    named: dict[str, Any] = {key: getattr(recipe, key) for key in ("source", "teacher", "tokenizer")}
    named = {key: pins.get(name, name) for key, name in named.items()}
    return dataclasses.replace(recipe, convert=convert, data=data, **named)


def _texts(recipe: Recipe) -> list[str]:
    calibration = recipe.convert.calibration if recipe.convert else ()
    return [*recipe.data.train, *recipe.data.held_out, *calibration]


def _inputs(recipe: Recipe) -> list[str]:
    """Returns everything that a recipe reads, as it names it."""
    return [*filter(None, (recipe.source, recipe.teacher, recipe.tokenizer)), *_texts(recipe)]

"""What docs/ names exists: functions, files and commands."""

import dataclasses
import importlib
import re
import shlex
from functools import reduce
from pathlib import Path
from typing import Any

import pytest

from smolseek.cli import VERBS, parse_verb
from smolseek.config import TrainSettings, load_recipe
from smolseek.training.stages import stages_of

ROOT = Path(__file__).parent.parent
METHOD, TRAINING = ((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("method", "training"))
PROSE = re.sub(r"```.*?```", "", METHOD, flags=re.DOTALL)
PACKAGE = ROOT / "smolseek" / "conversion"
MODULES = {path.stem for path in PACKAGE.glob("*.py")}
NAMED = sorted(set(re.findall(r"`([\w/.\-]+)`", PROSE)))
FUNCTIONS = [
    n for n in NAMED if re.fullmatch(r"[\w.]+\.\w+", n) and n.split(".")[0] in MODULES | {"smolseek", "benchmarks"}
]
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", METHOD + TRAINING, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip()
]
RECIPES = re.findall(r"```yaml\n(.*?)```", TRAINING, re.DOTALL)


def function_cells() -> list[str]:
    """The last cells of the tables whose last column is of functions."""
    cells = []
    for table in re.findall(r"(?:^\|.*\|\n)+", PROSE, re.MULTILINE):
        head, _, *rows = (line.strip("|").split("|")[-1].strip() for line in table.splitlines())
        cells += [cell for cell in rows if head == "function" and cell]
    return cells


def lookup(name: str) -> Any:
    """A module's function, class or method, by the shortest path of modules that leads there."""
    parts = (
        name.split(".")
        if name.startswith(("smolseek.", "benchmarks."))
        else ["smolseek", "conversion", *name.split(".")]
    )
    count = next(n for n in range(1, len(parts) + 1) if not ROOT.joinpath(*parts[:n]).is_dir())
    return reduce(getattr, parts[count:], importlib.import_module(".".join(parts[:count])))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_exist(name):
    assert callable(lookup(name))


def test_every_row_names_functions_alone():
    cells = function_cells()
    assert len(cells) > 40
    for cell in cells:
        names = cell.split(", ")
        assert all(name.strip("`") in FUNCTIONS and name == f"`{name.strip('`')}`" for name in names), cell


def test_a_function_that_does_not_exist_is_noticed():
    with pytest.raises(AttributeError):
        lookup("attention.no_such_function")


@pytest.mark.parametrize("name", [name for name in NAMED if "/" in name])
def test_files_exist(name):
    assert (ROOT / name).exists()


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_parse(line):
    words = shlex.split(line, comments=True)
    if words[0] == "smolseek":
        verb, *arguments = words[1:]
    else:  # train.py, by python or torchrun
        assert words[0] in ("python", "torchrun")
        verb, arguments = "train", words[words.index("train.py") + 1 :]
    parse_verb(VERBS[verb][0], verb, arguments)


@pytest.mark.parametrize("text", RECIPES)
def test_recipes_load(text, tmp_path):
    (tmp_path / "recipe.yaml").write_text(text)
    stages_of(load_recipe(tmp_path / "recipe.yaml").train)


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`train\.(\w+)[:`]", TRAINING))))
def test_settings_exist(name):
    assert name in {field.name for field in dataclasses.fields(TrainSettings)}

"""The pages under docs/: their commands run, what they name exists, and they become a site without the network."""

import dataclasses
import importlib
import json
import re
import shlex
import subprocess
import sys
from functools import reduce
from typing import Any

import pytest
import recipe_reference
from recipe_reference import descriptions, mapping_in, sections

from smolseek.cli import main
from smolseek.config import Recipe, TrainSettings, load_recipe
from smolseek.training.stages import stages_of
from tests.configs import SMOLLM2_135M
from tests.pages import NOT_RUN, ROOT, commands, read, walk

PAGES = {
    path.relative_to(ROOT / "docs").as_posix(): path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "docs").rglob("*.md"))
}
METHOD, README = PAGES["method.md"], (ROOT / "README.md").read_text(encoding="utf-8")
PROSE = re.sub(r"```.*?```", "", METHOD, flags=re.DOTALL)
MODULES = {path.stem for path in (ROOT / "smolseek" / "conversion").iterdir()}
NAMED = sorted(set(re.findall(r"`([\w/.\-]+)`", PROSE)))
FUNCTIONS = [
    n for n in NAMED if re.fullmatch(r"[\w.]+\.\w+", n) and n.split(".")[0] in MODULES | {"smolseek", "benchmarks"}
]
CODE = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for folder in ("smolseek", "tests", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
}


def cited_sections(code: str) -> list[str]:
    """The titles of docs/method.md's sections that docstrings and comments of a file cite."""
    return re.findall(r'docs/method\.md, "([^"\\]+)"', re.sub(r"\s+(?:# )?", " ", code))


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
        lookup("mla.latent.no_such_function")


@pytest.mark.parametrize(
    "name",
    sorted(
        set(re.findall(r"`((?:smolseek|tests|benchmarks|recipes|docs)/[\w/.\-]*)`", "".join([README, *PAGES.values()])))
    ),
)
def test_files_exist(name):
    assert (ROOT / name).exists()


def test_the_sections_that_code_cites_exist():
    cited = {title: name for name, text in CODE.items() for title in cited_sections(text)}
    assert len(cited) > 5
    assert {title: name for title, name in cited.items() if f"\n## {title}\n" not in METHOD} == {}


def test_a_section_cited_over_two_lines_is_seen():
    assert cited_sections('"""See (docs/method.md,\n    "Rope slots")."""') == ["Rope slots"]
    assert cited_sections('# docs/method.md, "Rope\n# slots"') == ["Rope slots"]


def test_nothing_cites_the_design_note():
    texts = CODE | PAGES
    assert [name for name, text in texts.items() if re.search("design (?:§|section)", text, re.IGNORECASE)] == []


# -- commands ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, text in PAGES.items() if commands(text)])
def test_commands_run(name, tmp_path, monkeypatch, capsys):
    walk(PAGES[name], tmp_path, monkeypatch, capsys, files="".join(PAGES.values()))


@pytest.mark.parametrize("name", PAGES)
def test_commands_stand_in_blocks_that_are_run(name):
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", PAGES[name], re.DOTALL | re.MULTILINE)
    prose = re.sub(r"^```.*?^```", "", PAGES[name], flags=re.DOTALL | re.MULTILINE)
    others = [text for language, text in blocks if language != "sh"] + re.findall(r"^    .*", prose, re.MULTILINE)
    command = re.compile(r"^ *\$? *(?:smolseek|python|torchrun|make|pip) ", re.MULTILINE)
    assert [text for text in others if command.search(text)] == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("smolseek plan llama-folder --no-such-option 1", "no-such-option"),
        ("torchrun train.py recipes/heal.yaml --train.no-such-option 1", "no-such-option"),
        ("torchrun -m smolseek convert llama-folder half --no-such-option 1", "no-such-option"),
        ("make no-such-target", "no-such-target"),
        ("pip install -e .[no-such-extra]", "no-such-extra"),
        ("python benchmarks/no_such_script.py", "no_such_script"),
    ],
)
def test_a_command_that_would_fail_is_noticed(line, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises((ValueError, AssertionError), match=message):
        read(line)


def test_what_the_reasons_for_not_running_name_exists():
    names = re.findall(r"tests/[\w/]+\.py", " ".join(NOT_RUN.values()))
    assert names and all((ROOT / name).is_file() for name in names), names


def test_the_plan_in_the_walk_through_is_what_is_printed(tmp_path, capsys):
    text = PAGES["smollm2.md"]
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2_135M))
    _, verb, _, *options = shlex.split(commands(text)[0])
    assert main([verb, str(tmp_path), *options]) == 0
    of_machines = ("decoding", "this machine", "convert", "  of which", "heal")
    shown = re.search(r"```text\n(.*?)```", text, re.DOTALL)[1].splitlines()
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in shown if line not in printed and not line.startswith(of_machines)] == []


def test_the_table_of_the_quickstart_is_the_readme_s():
    table = re.search(r"^ +loss .*?^MaxVio[^\n]*", PAGES["quickstart.md"], re.DOTALL | re.MULTILINE)
    assert table and table[0] in (ROOT / "README.md").read_text(encoding="utf-8")


# -- recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", [text for page in PAGES.values() for text in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)]
)
def test_recipes_load(text, tmp_path):
    (tmp_path / "recipe.yaml").write_text(text)
    stages_of(load_recipe(tmp_path / "recipe.yaml").train)


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`train\.(\w+)[:`]", "".join(PAGES.values())))))
def test_settings_exist(name):
    assert name in {field.name for field in dataclasses.fields(TrainSettings)}


def test_the_recipe_reference_is_in_step_with_the_code():
    assert recipe_reference.PAGE.read_text(encoding="utf-8") == recipe_reference.page(), (
        "run: python docs/recipe_reference.py"
    )


def test_every_setting_is_described():
    for _, kind in sections(Recipe, ""):
        assert list(descriptions(kind)) == [field.name for field in dataclasses.fields(kind)]


def test_settings_in_settings_are_found():
    assert mapping_in(dict[str, float]) is None
    assert [name for name, _ in sections(Recipe, "")][:2] == ["", "convert"]
    assert "train.stages" in dict(sections(Recipe, ""))


# -- the site ---------------------------------------------------------------------------------------------------------


def test_the_site_is_built_strictly_and_loads_nothing_from_elsewhere(tmp_path):
    pytest.importorskip("material", reason="needs smolseek[docs]")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    loads = re.compile(
        r"<(?:script|img|iframe)[^>]+src=.?(?:https?:)?//|<link[^>]+stylesheet[^>]+href=.?(?:https?:)?//"
    )
    sites = sorted(tmp_path.rglob("*.html"))
    assert len(sites) > len(PAGES)  # and the one for addresses that do not exist
    for site in sites:
        html = site.read_text(encoding="utf-8")
        assert not loads.search(html), site
        assert len(re.findall("<h1", html)) == 1, f"{site}: a line that was not meant to begins with #"
    for sheet in tmp_path.rglob("*.css"):
        assert not re.search(r"url\(.?(?:https?:)?//|@import", sheet.read_text(encoding="utf-8")), sheet

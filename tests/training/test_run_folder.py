"""Names that are no paths, folders that may be removed, commits that are pinned."""

import dataclasses
import json

import pytest

from smolseek.checkpoint.atomic import LOCK, exclusive
from smolseek.config import ConvertSettings, DataSettings, Recipe
from smolseek.training import run_folder
from smolseek.training.run_folder import (
    check_folder,
    check_name,
    clear_folder,
    new_pins,
    pin_recipe,
    read_pins,
    write_about,
)

COMMIT = "0123456789" * 4


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/tmp/a", "../a", "a\\b", "a\0", "é" * 101])
def test_a_name_is_one_plain_component(name):
    with pytest.raises(ValueError, match=r"name .* is the name of a folder under runs/"):
        check_name(name)
    check_name("heal-2.b")


def test_only_a_runs_folder_may_be_removed(tmp_path):
    folder, recipe = tmp_path / "run", Recipe(source="m")
    check_folder(folder, recipe, resume=False, force=False)
    folder.mkdir()
    check_folder(folder, recipe, resume=False, force=True)
    with pytest.raises(ValueError, match="exists already; pass --resume"):
        check_folder(folder, recipe, resume=False, force=False)
    (folder / "photo.jpg").write_text("precious")
    for force in (True, False):
        with pytest.raises(ValueError, match=r"exists, and is no run's folder, which has a run\.json"):
            check_folder(folder, recipe, resume=False, force=force)
    write_about(folder, recipe, {}, 1)
    check_folder(folder, recipe, resume=False, force=True)


@pytest.mark.parametrize("field", ["source", "teacher", "tokenizer", "train", "held_out", "calibration", "glob"])
def test_a_folder_with_an_input_in_it_is_not_removed(field, tmp_path):
    folder = tmp_path / "run"
    (folder / "mine").mkdir(parents=True)
    (folder / "mine" / "a.txt").write_text("text")
    recipe = Recipe(source="m", convert=ConvertSettings())
    write_about(folder, recipe, {}, 1)
    mine = str(folder / "mine")
    if field in ("source", "teacher", "tokenizer"):
        recipe = dataclasses.replace(recipe, **{field: mine})
    elif field == "calibration":
        recipe = dataclasses.replace(recipe, convert=ConvertSettings(calibration=(f"{mine}/a.txt",)))
    elif field == "glob":
        recipe = dataclasses.replace(recipe, data=DataSettings(train=(f"{tmp_path}/*/mine/*.txt",)))
    else:
        recipe = dataclasses.replace(recipe, data=DataSettings(**{field: (f"{mine}/a.txt",)}))
    with pytest.raises(ValueError, match="which is read here and would be removed; name another"):
        check_folder(folder, recipe, resume=False, force=True)
    check_folder(folder, recipe, resume=True, force=False)


def test_a_cleared_folder_keeps_the_lock_and_what_links_point_to(tmp_path):
    folder, other = tmp_path / "run", tmp_path / "other"
    other.mkdir()
    (other / "file").write_text("precious")
    with exclusive(folder):
        (folder / "model").mkdir()
        (folder / "link").symlink_to(other)
        clear_folder(folder)
        assert [path.name for path in folder.iterdir()] == [LOCK]
        with pytest.raises(ValueError, match="another process is at work in it"), exclusive(folder):
            pass
    with exclusive(folder):
        assert (other / "file").read_text() == "precious"


@pytest.fixture
def hub(monkeypatch):
    """Every checkpoint and data set with a / in its name is on a hub whose newest commit can be set."""
    newest = {"commit": COMMIT}
    monkeypatch.setattr(run_folder, "pinned", lambda name: f"{name}@{newest['commit']}" if "/" in name else name)
    monkeypatch.setattr(
        run_folder, "pinned_spec", lambda spec: f"{spec}@{newest['commit']}" if spec.startswith("hub:") else spec
    )
    return newest


def test_a_run_reads_one_commit_of_everything_to_its_end(hub, tmp_path):
    recipe = Recipe(
        source="owner/dense",
        teacher="local",
        tokenizer="owner/words",
        convert=ConvertSettings(calibration=("hub:o/t", "a.txt")),
        data=DataSettings(train=("hub:o/d", "b.txt"), held_out=("hub:o/t",)),
    )
    pins = new_pins(recipe)
    pinned = pin_recipe(recipe, pins)
    assert pinned.source == f"owner/dense@{COMMIT}" and pinned.tokenizer == f"owner/words@{COMMIT}"
    assert pinned.teacher == "local" and pinned.data.train == (f"hub:o/d@{COMMIT}", "b.txt")
    assert pinned.data.held_out == (f"hub:o/t@{COMMIT}",) and pinned.convert.calibration == (pins["hub:o/t"], "a.txt")
    write_about(tmp_path, pinned, pins, 1)
    hub["commit"] = "f" * 40  # the hub moves on, the run does not
    assert pin_recipe(recipe, read_pins(tmp_path, recipe)) == pinned
    (tmp_path / "converted").mkdir()
    check_folder(tmp_path, recipe, resume=True, force=False)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"source": "other"}, "source 'm' then, 'other' now"),
        ({"convert": ConvertSettings(cache=0.5)}, "convert.cache None then, 0.5 now"),
        ({"convert": None}, "convert {.*} then, None now"),
        ({"tokenizer": "t"}, "tokenizer None then, 't' now"),
    ],
)
def test_a_resumed_run_starts_from_what_it_started_from(changes, words, tmp_path):
    recipe = Recipe(source="m", convert=ConvertSettings())
    write_about(tmp_path, recipe, {}, 1)
    other = dataclasses.replace(recipe, **changes)
    check_folder(tmp_path, other, resume=True, force=False)  # nothing is made yet
    (tmp_path / "converted").mkdir()
    check_folder(tmp_path, dataclasses.replace(recipe, data=DataSettings(train=("b.txt",))), resume=True, force=False)
    with pytest.raises(ValueError, match=words):
        check_folder(tmp_path, other, resume=True, force=False)
    about = json.loads((tmp_path / "run.json").read_text())
    del about["recipe"]["convert"]["calibration_weights"]  # written before the field existed
    (tmp_path / "run.json").write_text(json.dumps(about))
    check_folder(tmp_path, recipe, resume=True, force=False)


@pytest.mark.parametrize("change", [{"pins": 3}, {"pins": {"a": None}}, {"recipe": [1]}])
def test_a_run_file_of_other_values_is_one_line(change, tmp_path):
    recipe = Recipe(source="m")
    write_about(tmp_path, recipe, {}, 1)
    (tmp_path / "converted").mkdir()
    about = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(about | change))
    with pytest.raises(ValueError, match=r"run\.json: its recipe or pins are not as smolseek writes them"):
        check_folder(tmp_path, recipe, resume=True, force=False)

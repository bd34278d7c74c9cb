import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from smolseek.checkpoint.atomic import atomic_file, atomic_folder, check_space, remove_leftovers

DEAD = 9_999_999
"""No process has this number: it is above the highest."""


def test_a_folder_appears_when_the_block_ends(tmp_path):
    with atomic_folder(tmp_path / "a" / "out") as folder:
        (folder / "file").write_text("1")
        assert not (tmp_path / "a" / "out").exists()
    assert (tmp_path / "a" / "out" / "file").read_text() == "1"
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["out"]


def test_a_failed_block_leaves_nothing_and_keeps_the_old(tmp_path):
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("old")
    with pytest.raises(OSError), atomic_folder(tmp_path / "out", force=True) as folder:
        (folder / "file").write_text("new")
        raise OSError("disk full")
    assert (tmp_path / "out" / "file").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_existing_folder_needs_force(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="--force"), atomic_folder(tmp_path / "out"):
        pass
    with atomic_folder(tmp_path / "out", force=True) as folder:
        (folder / "file").write_text("new")
    assert (tmp_path / "out" / "file").exists()


def test_a_file_is_whole_or_not_there(tmp_path):
    out = tmp_path / "a" / "out"
    with atomic_file(out) as path:
        path.write_text("old")
        assert not out.exists()
    with pytest.raises(ValueError, match="--force"), atomic_file(out):
        pass
    with pytest.raises(OSError), atomic_file(out, force=True) as path:
        path.write_text("half")
        raise OSError("disk full")
    assert out.read_text() == "old" and list(out.parent.iterdir()) == [out]
    with atomic_file(out, force=True) as path:
        path.write_text("new")
    assert out.read_text() == "new"


def test_leftovers_of_killed_writers_go(tmp_path):
    (tmp_path / f".model.partial-{DEAD}-a").mkdir()
    (tmp_path / f".run.json.partial-{DEAD}-a").write_text("{")
    (tmp_path / f".other.partial-{os.getppid()}-a").mkdir()
    (tmp_path / "run.json").write_text("{}")
    remove_leftovers(tmp_path, "run.json")
    assert len(list(tmp_path.iterdir())) == 3
    remove_leftovers(tmp_path)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [f".other.partial-{os.getppid()}-a", "run.json"], "its writer lives"


def test_a_folder_whose_successor_never_came_is_back(tmp_path):
    for name in (f".best.old-{DEAD}-a", f".model.old-{DEAD}-a", "model"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(name)
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"best", "model"}
    assert (tmp_path / "model" / "weights").read_text() == "model"


def test_an_error_between_the_two_renames_loses_nothing(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "file").write_text("old")
    rename = Path.rename

    def fail(path, target):
        if ".partial-" in path.name:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(KeyboardInterrupt), atomic_folder(out, force=True) as folder:
        (folder / "file").write_text("new")
    assert (out / "file").read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_never_replaces_a_folder(tmp_path):
    (tmp_path / "out").mkdir()
    for force in (False, True):
        with pytest.raises(ValueError, match="is a folder"), atomic_file(tmp_path / "out", force=force):
            pass
    assert (tmp_path / "out").is_dir()


def test_small_sizes_are_told_in_megabytes(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2_000_000))
    with pytest.raises(ValueError, match=r"2\.0 MB free, and 3\.5 GB are needed there to try"):
        check_space(tmp_path, 3_500_000_000, "to try")

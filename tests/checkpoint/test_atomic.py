import pytest

from smolseek.checkpoint.atomic import atomic_file, atomic_folder, remove_leftovers


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
    (tmp_path / ".model.partial-1-a").mkdir()
    (tmp_path / ".run.json.partial-1-a").write_text("{")
    (tmp_path / "run.json").write_text("{}")
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_a_file_never_replaces_a_folder(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="is a folder"), atomic_file(tmp_path / "out", force=True):
        pass
    assert (tmp_path / "out").is_dir()

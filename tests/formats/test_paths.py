import pytest

from smolseek.formats.paths import plain_name, plain_names


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("/home/me/models/dense", "dense"),
        ("./dense", "dense"),
        ("~/models/dense", "dense"),
        ("../a/b/text.txt", "text.txt"),
        ("data/text.txt", "text.txt"),
        ("C:\\models\\dense", "dense"),
        ("dense", "dense"),
        ("owner/SmolLM2-1.7B", "owner/SmolLM2-1.7B"),
        ("hub:owner/data:config", "hub:owner/data:config"),
        ("builtin:python", "builtin:python"),
    ],
)
def test_a_path_is_its_last_name_and_an_id_stays(name, plain):
    assert plain_name(name) == plain


def test_a_folder_that_is_there_is_no_id(tmp_path, monkeypatch):
    (tmp_path / "models" / "dense").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert plain_name("models/dense") == "dense"


def test_a_tree_keeps_everything_but_paths():
    tree = {
        "source": "/a/b",
        "settings": {"calibration": ["/a/c.txt", "hub:o/d"], "separator": "/"},
        "calibration": {"sources": [{"source": "/a/c.txt", "windows": 3}]},
        "data": {"train": ("/a/c.txt",), "held_out": ["x/y/z.txt"]},
        "teacher": None,
    }
    assert plain_names(tree) == {
        "source": "b",
        "settings": {"calibration": ["c.txt", "hub:o/d"], "separator": "/"},
        "calibration": {"sources": [{"source": "c.txt", "windows": 3}]},
        "data": {"train": ["c.txt"], "held_out": ["z.txt"]},
        "teacher": None,
    }

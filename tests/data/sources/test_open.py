import itertools
import json

import pytest

from smolseek.data.sources import local_sizes, open_source, open_sources
from tests.data.sources.reading import texts
from tests.text import stories


def test_several_sources_are_one(files):
    source = open_sources([str(files / "a.txt"), str(files / "a.jsonl")])
    assert texts(source) == stories(10) * 2
    position, _ = next(itertools.islice(source.documents(None), 11, None))
    assert texts(source, json.loads(json.dumps(position))) == stories(10)[2:]


@pytest.mark.parametrize(
    ("spec", "words"),
    [("nowhere.txt", "no such file"), ("builtin:java", "built-in texts are builtin:python and builtin:prose")],
)
def test_sources_that_are_not_there(spec, words):
    with pytest.raises(ValueError, match=words):
        open_source(spec)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a.csv", r"type \.csv is not \.txt, \.jsonl, \.parquet; convert it"),
        ("a.json", r"type \.json is not .*; write one JSON object a line, as \.jsonl"),
        ("a.jsonl.gz", r"type \.gz is not .*; unpack it"),
        ("a", r"type \(none\) is not"),
    ],
)
def test_unknown_file_types(tmp_path, name, words):
    (tmp_path / name).write_text("a")
    with pytest.raises(ValueError, match=words) as raised:
        open_source(str(tmp_path / name))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_suffixes_in_any_case(files, name):
    (files / name).rename(files / name.upper())
    source = open_source(str(files / name.upper()))
    assert texts(source) == stories(10) and source.size() > 0


def test_a_folder_is_all_its_files(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    names = ["z.txt", "b/2.TXT", "b/1.jsonl", "a.txt", "read.md", ".hidden/a.txt", "b/.a.txt"]
    for name in names:
        (tmp_path / name).write_text(json.dumps({"text": name}) if name.endswith("l") else name)
    everything = ["a.txt", "b/1.jsonl", "b/2.TXT", "z.txt"]
    assert texts(open_source(str(tmp_path))) == texts(open_source(f"{tmp_path}/")) == everything
    assert texts(open_source(f"{tmp_path}/*/")) == everything[1:3]
    assert texts(open_source(f"{tmp_path}/b/**")) == everything[1:3]  # the glob gives the folder and its files


def test_a_folder_without_text_is_one_line(tmp_path):
    (tmp_path / "read.md").write_text("a")
    with pytest.raises(ValueError, match=r"no \.txt, \.jsonl, \.parquet file in this folder") as raised:
        open_source(str(tmp_path))
    assert "\n" not in str(raised.value)


def test_a_file_whose_name_looks_like_a_glob(tmp_path):
    for name in ("a[1].txt", "a1.txt"):
        (tmp_path / name).write_text(name)
    assert texts(open_source(str(tmp_path / "a[1].txt"))) == ["a[1].txt"]


def test_the_sizes_of_local_files_are_listed(tmp_path):
    (tmp_path / "texts" / "deep").mkdir(parents=True)
    for name, text in (("texts/a.txt", "abc"), ("texts/deep/b.txt", "ä"), ("c.jsonl", "")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    specs = (str(tmp_path / "texts"), str(tmp_path / "*.jsonl"), "builtin:prose", "builtin:python", "hub:a/b")
    sizes = {str(tmp_path / name): size for name, size in (("texts/a.txt", 3), ("texts/deep/b.txt", 2), ("c.jsonl", 0))}
    assert local_sizes(specs) == sizes

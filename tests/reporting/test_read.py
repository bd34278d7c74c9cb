import json

import pytest

from smolseek.reporting.read import distinct_names, read_folders, read_metrics, read_run
from tests.reporting.folders import step_line, write_conversion, write_run


def test_a_run_says_what_it_did(tmp_path):
    run = read_run(write_run(tmp_path / "first"), "first")
    assert run.series("loss") == (list(range(6)), [pytest.approx(3 - 0.01 * step) for step in range(6)])
    assert run.series("held_out", "loss") == ([5], [3.1234])
    assert run.series("load", "1")[1][0][0] == 0.5 and run.layers == ["1", "2"]
    assert list(run.models) == ["dense", "converted", "healed"]
    assert run.samples["Once <b>"][0][0] == 5
    assert run.recipe["train"]["steps"] == 6 and run.versions["torch"] == "9.8.7"
    assert run.conversion is not None and run.conversion.cache_share == 0.5 and run.conversion.source == "tiny"


def test_runs_and_conversions_those_inside_runs_too(tmp_path):
    folders = [write_run(tmp_path / "first"), write_conversion(tmp_path / "small", numbers=24)]
    runs, conversions = read_folders(folders)
    assert [run.name for run in runs] == ["first"]
    assert [conversion.name for conversion in conversions] == ["first", "small"]


def test_a_run_before_its_first_step_and_one_cut_off_in_a_line(tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "run.json").write_text('{"recipe": {}, "versions": {}}')
    assert read_run(tmp_path / "new", "new").lines == []
    metrics = tmp_path / "metrics.jsonl"
    whole = json.dumps(step_line(0, 3.0)) + "\n"
    metrics.write_bytes((whole + '{"step": 1, "lo€').encode()[:-1])
    assert [line["step"] for line in read_metrics(metrics)] == [0]
    for broken in ('{"half', "[" * 100_000):
        metrics.write_text(f"{broken}\n{whole}")
        with pytest.raises(ValueError, match="line 1 is no record of a step"):
            read_metrics(metrics)


def test_names_have_as_many_parents_as_they_need(tmp_path):
    folders = [tmp_path / "a" / "heal", tmp_path / "b" / "heal", tmp_path / "c"]
    assert distinct_names(folders) == ["a/heal", "b/heal", "c"]
    with pytest.raises(ValueError, match="named twice"):
        distinct_names([tmp_path / "c", tmp_path / "a" / ".." / "c"])


@pytest.mark.parametrize("text", ["{", "[]", '{"source": "a"}', '{"losses": 3}'])
def test_a_broken_conversion_is_named(tmp_path, text):
    (tmp_path / "conversion.json").write_text(text)
    with pytest.raises(ValueError, match=r"conversion\.json: not "):
        read_folders([tmp_path])


@pytest.mark.parametrize(
    "change",
    [
        {"source": 3},
        {"cache": {"numbers_per_token": 1, "source_numbers_per_token": 0}},
        {"judged": [{"source": "a.txt"}]},
    ],
)
def test_a_conversion_of_other_values_is_named(tmp_path, change):
    path = write_conversion(tmp_path / "c") / "conversion.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=r"conversion\.json: not as smolseek writes it"):
        read_folders([path.parent])


def test_a_folder_of_something_else(tmp_path):
    with pytest.raises(ValueError, match="neither a run"):
        read_folders([tmp_path])

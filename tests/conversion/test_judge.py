"""A conversion is measured on texts that nothing is learnt from; what is no such text is refused first."""

import json
import math
from pathlib import Path

import pytest
import torch

from smolseek.checkpoint.hub import load_for_evaluation
from smolseek.config import DataSettings
from smolseek.conversion.judge import perplexity_ratios
from smolseek.conversion.pipeline import convert
from smolseek.data.drawing import held_out_text
from smolseek.data.packing import Packed
from smolseek.evaluation import measure_divergence, measure_quality
from tests.text import tiny_tokenizer, write_stories


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A file of other stories."""
    return str(write_stories(tmp_path_factory.mktemp("other") / "other.txt", seed=7))


def test_both_folders_are_measured_as_eval_measures_them(source, quick, other, tmp_path):
    told = []
    settings, tell = quick(distill_steps=0), lambda *how: told.append(how)
    out = convert(source, tmp_path / "out", settings=settings, judge=other, on_progress=tell)
    report = json.loads((out / "conversion.json").read_text())
    (found,) = report["judged"]
    text = held_out_text(tiny_tokenizer(), DataSettings(held_out=(other,), held_out_tokens=8192))
    dense, converted = map(load_for_evaluation, (source, out))
    dense_loss, loss = (measure_quality(model, text.ids_T, text.text_bytes).loss for model in (dense, converted))
    assert found["source"] == other and found["tokens"] > 1000
    assert found["perplexity"] == pytest.approx(math.exp(loss)) and found["ratio"] == pytest.approx(
        math.exp(loss - dense_loss)
    )
    assert found["dense_perplexity"] == pytest.approx(math.exp(dense_loss))
    divergence = measure_divergence(converted, dense, text.ids_T)  # over the last position of each window too
    assert found["kl"] == pytest.approx(divergence.kl, rel=0.05)
    assert found["agreement"] == pytest.approx(divergence.agreement, abs=0.02)
    windows = [(done, count) for stage, done, count in told if stage == "judge"]
    assert windows == [(done, windows[-1][1]) for done in range(1, windows[-1][1] + 1)]
    card = (out / "README.md").read_text()
    assert f"| other.txt | {found['tokens']:,} | {found['dense_perplexity']:.3f} |" in card and other not in card


def test_nothing_is_learnt_from_it(source, quick, other, tmp_path):
    """The weights are the same without it, and so is all else in conversion.json."""
    third = str(write_stories(tmp_path / "third.txt", seed=8))
    plain, judged = (
        convert(source, tmp_path / name, settings=quick(distill_steps=0), judge=judge)
        for name, judge in (("plain", ()), ("judged", (Path(other), third)))
    )
    assert (plain / "model.safetensors").read_bytes() == (judged / "model.safetensors").read_bytes()
    reports = [json.loads((folder / "conversion.json").read_text()) for folder in (plain, judged)]
    assert [record["source"] for record in reports[1].pop("judged")] == [other, third]
    assert {**reports[0], "seconds": 0} == {**reports[1], "seconds": 0}
    assert {path.name for path in plain.iterdir()} == {path.name for path in judged.iterdir()}


def test_an_exact_form_is_measured_without_calibration(source, quick, other, tmp_path):
    out = convert(source, tmp_path / "out", settings=quick(exact=True, calibration=()), judge=(other,))
    (found,) = json.loads((out / "conversion.json").read_text())["judged"]
    assert found["ratio"] == pytest.approx(1, abs=1e-4) and found["agreement"] > 0.99
    assert found["tokens"] > 1000


@pytest.fixture
def refused(source, quick, tmp_path, monkeypatch):
    """Converts and returns the one line that refuses; the model was not even loaded."""

    def heavy(*_):
        raise AssertionError("it began")

    monkeypatch.setattr("smolseek.conversion.pipeline._write", heavy)

    def refuse(judge, **fields):
        with pytest.raises(ValueError, match=r"judge|no such file") as error:
            convert(source, tmp_path / "out", settings=quick(**fields.pop("settings", {})), judge=judge, **fields)
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
        return str(error.value)

    return refuse


def test_text_that_is_not_there_or_too_short(refused, tmp_path):
    assert "nowhere.txt: no such file" in refused("nowhere.txt")
    (tmp_path / "short.txt").write_text("Anna sees.")
    assert "short.txt: 3 tokens, less than one window of 64; name more text" in refused(tmp_path / "short.txt")


def test_calibration_text_under_any_name(refused, text, other, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "link.txt").symlink_to(text)
    for name in (text, folder, folder / "*.txt", Path(text).parent / "." / Path(text).name):
        said = refused((other, name))
        assert said == f"judge {name}: {Path(text).resolve()} is calibration text too, and is learnt from; " + (
            "name other text"
        )
    assert "calibration text too" in refused(other, settings={"calibration": (text, str(Path(other).parent))})


def test_a_data_set_of_the_hub_is_the_same_at_any_revision(refused):
    said = refused("hub:owner/name@abc:en", settings={"calibration": ("hub:owner/name:en",)})
    assert said.startswith("judge hub:owner/name@abc:en: hub:owner/name:en is calibration text too")


def test_of_the_built_in_text_the_part_that_calibrates_is_not_judged_on(refused, monkeypatch):
    """Where a run holds other text out, the whole of it calibrates."""
    data = DataSettings(train=("builtin:python",), held_out=("nowhere.txt",))
    assert "builtin:python is calibration text too" in refused("builtin:python", data=data)
    read = []
    monkeypatch.setattr("smolseek.conversion.judge.held_out_text", lambda _, data: read.append(data) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        refused("builtin:python", settings={"calibration": ("builtin:python",)})
    assert read[0].train == ("builtin:python",) and not read[0].held_out and read[0].held_out_share == 0.1


def test_conversations_cut_off_before_the_assistant_speaks(refused, other, monkeypatch):
    silent = Packed(torch.ones(100, dtype=torch.long), torch.zeros(100, dtype=torch.bool), 0)
    monkeypatch.setattr("smolseek.conversion.judge.held_out_text", lambda *_: silent)
    assert refused(other).startswith(f"judge {other}: the assistant says nothing in it")


def test_text_in_the_folder_that_would_be_replaced(source, quick, other, tmp_path):
    out = convert(source, tmp_path / "out", settings=quick(exact=True))
    (out / "tokenizer.txt").write_text(Path(other).read_text())
    with pytest.raises(ValueError, match=r"would (be removed|remove tokenizer\.txt)"):
        convert(source, out, settings=quick(exact=True), judge=out / "tokenizer.txt", force=True)
    assert (out / "tokenizer.txt").exists()


def test_ratios_are_of_the_last_stage_and_of_each_text():
    losses = {"dense": 1.0, "closed_form": 2.0, "refined": 1.5}
    judged = [{"source": "a.txt", "ratio": 1.2}]
    ratios = perplexity_ratios({"losses": losses, "judged": judged})
    assert ratios == {"the calibration text": pytest.approx(math.exp(0.5)), "a.txt": 1.2}
    assert perplexity_ratios({"losses": losses | {"distilled": 1.1}})["the calibration text"] == pytest.approx(
        math.exp(0.1)
    )
    assert perplexity_ratios({"losses": {}}) == {}

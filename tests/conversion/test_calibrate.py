"""Calibration from text, from the model itself, and from both, in whole conversions."""

import json
from typing import Any

import pytest
import torch

from smolseek.config import ConvertSettings
from smolseek.conversion import calibrate, distill
from smolseek.conversion.calibrate import read_calibration, read_named_text
from smolseek.conversion.job import read_job
from smolseek.conversion.pipeline import convert
from smolseek.conversion.self_text import Openings
from smolseek.conversion.work_folder import WorkFolder
from tests.text import write_stories


def read(source, out, settings, told=lambda *_: None):
    """Returns the calibration of a conversion of `source`."""
    job = read_job(source, out, settings, device="cpu", force=False, on_progress=told)
    text = read_named_text(job)
    with WorkFolder(out, {}) as work:
        return read_calibration(job, text, work)


def all_windows(calibration):
    return torch.cat([calibration.judged_BT, calibration.refined_BT])


def test_a_conversion_without_any_text(source, quick, tmp_path):
    told = []
    out = convert(source, tmp_path / "out", settings=quick(calibration=()), on_progress=lambda *step: told.append(step))
    report = json.loads((out / "conversion.json").read_text())
    (fact,) = report["calibration"]["sources"]
    assert fact["source"] == "self" and fact["windows"] == 6 + 8 and fact["documents"] >= fact["windows"]
    assert report["settings"]["calibration"] == ["self"]
    assert "self: 14 windows of" in (out / "README.md").read_text()
    assert ("sample text", 14 * 64, 14 * 64) in told
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_same_seed_and_nothing_named_give_the_same_windows(source, quick, tmp_path):
    first, named, other = (
        all_windows(read(source, tmp_path / "out", quick(**changes)))
        for changes in ({"calibration": ()}, {"calibration": ("self",)}, {"calibration": ("self",), "seed": 1})
    )
    assert torch.equal(first, named) and not torch.equal(first, other)


def test_the_model_writes_its_share_beside_the_text(source, quick, text, tmp_path):
    settings = quick(calibration=("self", text), calibration_weights=(5.0, 2.0))
    mixed, plain = (read(source, tmp_path / "out", s) for s in (settings, quick(calibration_windows=8)))
    counts = {fact["source"]: fact["windows"] for fact in mixed.facts["sources"]}
    assert counts == {"self": 10, text: 4} and len(all_windows(mixed)) == 14
    assert all(fact["source"] == text for fact in plain.facts["sources"])
    equal = read(source, tmp_path / "out", quick(calibration=(text, "self")))
    assert {fact["windows"] for fact in equal.facts["sources"]} == {7}


def test_the_end_to_end_stage_has_longer_windows_of_the_text_that_is_named(source, quick, text, tmp_path, monkeypatch):
    plain = read(source, tmp_path / "out", quick(calibration=("self", text)))
    monkeypatch.setattr(calibrate, "more_windows", lambda *_: (12, 128))
    more = read(source, tmp_path / "out", quick(calibration=("self", text)))
    assert len(plain.more_BT) == 0 and more.more_BT.shape == (12, 128) and len(all_windows(more)) == 14
    pieces = {tuple(row) for row in more.more_BT.view(24, 64).tolist()}
    assert sum(tuple(row) in pieces for row in more.refined_BT.tolist()) == 3  # four are judged by
    assert not any(tuple(row) in pieces for row in more.judged_BT.tolist())
    assert {fact["source"]: fact["windows"] for fact in more.facts["sources"]} == {"self": 7, text: 2 * (12 + 4)}
    assert more.facts["end_to_end_tokens"] == more.facts["refinement_tokens"] + 12 * 128
    assert more.facts["tokens_sha256"] != plain.facts["tokens_sha256"]


def test_a_conversion_learns_end_to_end_from_longer_windows(source, quick, tmp_path, monkeypatch):
    seen: list[Any] = []
    monkeypatch.setattr(calibrate, "more_windows", lambda *_: (5, 128))
    monkeypatch.setattr(calibrate, "wanted_windows", lambda *_: 6)
    monkeypatch.setattr(distill, "distill", lambda *args, **_: seen.extend(args[2]))
    settings = quick(kv_lora_rank=8, qk_rope_head_dim=4, refine_steps=2, distill_steps=6)
    out = convert(source, tmp_path / "out", settings=settings)
    facts = json.loads((out / "conversion.json").read_text())["calibration"]
    texts = {id(text): text for ((text, _),) in seen}.values()
    assert sorted(text.ids_BT.shape[1] for text in texts) == [64, 128] and len(seen) == 6
    assert facts["end_to_end_tokens"] == sum(text.ids_BT.numel() for text in texts)


@pytest.mark.parametrize("start", [[], [1]])
def test_openings_are_the_shortest_texts_and_beginnings_pieces_half_of_them_behind_any_token(
    start, source, quick, text, tmp_path, monkeypatch
):
    """Where the tokenizer puts a token in front of a text, no other begins it."""
    ordinary = torch.tensor([7, 7])
    monkeypatch.setattr(calibrate, "read_openings", lambda *_: Openings(start, ordinary))
    small = read(source, tmp_path / "out", quick(calibration=(text,)))
    monkeypatch.setattr(calibrate, "is_small", lambda _: False)
    large = read(source, tmp_path / "out", quick(calibration=(text,)))
    assert len(small.openings_BT) == len(small.beginnings_BT) == 0
    assert large.openings_BT.tolist() == [[*start, 7]] * 2
    pieces = {tuple(piece) for piece in large.refined_BT.reshape(-1, 4).tolist()}
    whole, cut = large.beginnings_BT[1::2].tolist(), large.beginnings_BT[::2].tolist()
    assert len(whole) + len(cut) == large.refined_BT.numel() // 4 and {tuple(piece) for piece in whole} <= pieces
    assert {tuple(piece[1:]) for piece in cut} <= {piece[1:] for piece in pieces}
    assert all(piece[0] == 7 for piece in cut) is (not start)


def test_the_model_writes_more_where_there_is_too_little_text(source, quick, tmp_path):
    short = str(write_stories(tmp_path / "short.txt", count=2))
    sources = read(source, tmp_path / "out", quick(calibration=(short, "self"))).facts["sources"]
    assert sources[0]["windows"] < 7 and sources[0]["windows"] + sources[1]["windows"] == 14


def test_an_interrupted_conversion_goes_on_without_writing_again(source, quick, tmp_path, monkeypatch):
    settings = quick(calibration=("self",))
    whole = convert(source, tmp_path / "whole", settings=settings)

    def stop(stage, done, count):
        if stage == "closed form":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", settings=settings, on_progress=stop)
    monkeypatch.delattr(calibrate, "sample_windows")
    out = convert(source, tmp_path / "out", settings=settings)
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    reports = [json.loads((folder / "conversion.json").read_text())["calibration"] for folder in (out, whole)]
    assert reports[0] == reports[1]


def test_text_is_read_before_the_model_writes(source, tmp_path, quick):
    def told(stage, done, count):
        raise AssertionError(stage)

    with pytest.raises(ValueError, match=r"nowhere\.txt: no such file"):
        convert(source, tmp_path / "out", settings=quick(calibration=("self", "nowhere.txt")), on_progress=told)
    with pytest.raises(ValueError, match=r"calibration_weights .*: 1 for 2 sources of calibration"):
        settings = ConvertSettings(calibration=("self", "a.txt"), calibration_weights=(1.0,))
        convert(source, tmp_path / "out", settings=settings, on_progress=told)
    assert not list(tmp_path.iterdir())

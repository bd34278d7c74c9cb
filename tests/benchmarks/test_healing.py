"""The whole healing comparison on a tiny model: its measurements, an interruption, its report."""

import dataclasses
import json
from typing import Any

import healing
import pytest
from healing import DENSE, DISTILLED, ENTROPY, FIRST, Healing, compare, plot, report

from smolseek.checkpoint.hub import save
from smolseek.model import StockModel
from tests.factories import tiny_llama, tiny_v3
from tests.text import ENTRIES, tiny_tokenizer, write_stories


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("healing")
    save(StockModel(tiny_llama(vocab_size=ENTRIES)), folder / "dense", tokenizer_from=tiny_tokenizer())
    save(tiny_v3(vocab_size=ENTRIES), folder / "v3", tokenizer_from=tiny_tokenizer())
    train, held_out = (str(write_stories(folder / f"{name}.txt")) for name in ("train", "held-out"))
    settings: dict[str, Any] = {"seeds": (3,), "steps": 4, "batch_windows": 2, "window_tokens": 16, "evaluations": 2}
    settings |= {"text_tokens": 200, "out": "tiny", "results": folder / "results", "work": folder / "work"}
    return compare(Healing(str(folder / "v3"), str(folder / "dense"), (train,), (held_out,), **settings))


def test_every_arm_has_its_curve_with_every_optimizer(bench):
    runs = {(row["what"], row["optimizer"]): row for row in bench.rows if "optimizer" in row}
    assert set(runs) == {(a, o) for a in (ENTROPY, DISTILLED, FIRST, DENSE) for o in ("adamw", "muon")}
    for (arm, _), row in runs.items():
        assert [tokens for tokens, _ in row["curve"]] == [2 * 2 * 16, 4 * 2 * 16]
        assert row["perplexity"] > 1 and (row["maxvio"] is None) == (arm == DENSE)
        assert row["loss"] == pytest.approx(row["curve"][-1][1], rel=1e-2)
    assert not any((bench.healing.work / "tiny").iterdir())


def test_an_interrupted_comparison_goes_on_and_trains_nothing_twice(bench, monkeypatch):
    lines = bench.lines.read_text().splitlines()
    assert [json.loads(line) for line in lines[1:]] == bench.rows
    bench.lines.write_text("\n".join(lines[:-1]) + "\n")
    trained = []
    monkeypatch.setattr(healing, "_heal", lambda bench, *about: trained.append(about))
    compare(bench.healing)
    bench.lines.write_text("\n".join(lines) + "\n")
    assert trained == [(DENSE, "muon", 3)]


def test_other_settings_need_another_name(bench):
    with pytest.raises(ValueError, match="measured with another steps"):
        compare(dataclasses.replace(bench.healing, steps=5))


def test_training_text_is_no_held_out_text(bench):
    with pytest.raises(ValueError, match="training text too"):
        compare(dataclasses.replace(bench.healing, train=bench.healing.held_out))


def test_the_report_has_a_line_for_every_arm(bench, tmp_path):
    text = report(bench, "the command")
    for arm in (ENTROPY, DISTILLED, FIRST, DENSE):
        assert f"| {arm} | Muon |" in text and f"| {arm}, AdamW |" in text
    pytest.importorskip("matplotlib", reason="matplotlib is in the bench extra")
    plot(bench, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000

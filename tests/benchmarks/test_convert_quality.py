"""The whole comparison on a tiny model: its measurements, an interruption, its report."""

import dataclasses
import json
from typing import Any

import convert_quality
import pytest
from convert_quality import (
    HEALED,
    PUBLISHED,
    REPAIRED,
    STAGES,
    SVD,
    TRAINED,
    Comparison,
    compare,
    excess_below,
    mean_and_spread,
    plot,
    report,
)

from smolseek.checkpoint.hub import save
from smolseek.model import StockModel
from tests.factories import tiny_llama
from tests.text import ENTRIES, tiny_tokenizer, write_stories


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quality")
    save(StockModel(tiny_llama(vocab_size=ENTRIES)), folder / "tiny", tokenizer_from=tiny_tokenizer())
    texts = [(str(write_stories(folder / f"{name}.txt")),) for name in ("calibration", "held-out", "other")]
    settings: dict[str, Any] = {
        "shares": (0.5,),
        "seeds": (3,),
        "active": (0.75,),
        "refine_steps": 2,
        "distill_steps": 2,
        "heal_steps": 2,
        "calibration_windows": 8,
        "calibration_window_tokens": 32,
        "text_tokens": 200,
        "out": "tiny",
        "results": folder / "results",
        "work": folder / "work",
    }
    return Comparison(str(folder / "tiny"), *texts, **settings)


@pytest.fixture(scope="module")
def bench(comparison):
    return compare(comparison)


def test_every_method_and_stage_is_measured_once(bench):
    ours = [*STAGES.values(), HEALED]
    measured = [(row["part"], row["what"]) for row in bench.rows if row["what"] != "dense"]
    assert len(measured) == len(set(measured))
    assert {PUBLISHED, REPAIRED, SVD, *ours} <= {what for part, what in measured if part == "attention"}
    assert {what for part, what in measured if part == "carve"} == set(ours)
    assert {what for part, what in measured if part == "upcycle"} == {STAGES["closed"], HEALED}
    assert ("dense", TRAINED) in measured
    numbers = {row["numbers"] for row in bench.rows if row["part"] == "attention"}
    assert len(numbers) == 1, "all methods of a size keep the same cache"
    assert all(row["kl"] > -1e-6 and row["perplexity"] > 1 for row in bench.rows)
    assert all(row["logit_difference"] < 1e-4 for row in bench.rows if "logit_difference" in row)


def test_nothing_is_left_of_converted_folders_and_runs(bench):
    work = bench.comparison.work / bench.comparison.out
    assert not work.exists() or not any(work.iterdir())


def test_an_interrupted_comparison_goes_on_and_measures_nothing_twice(bench, monkeypatch):
    lines = bench.lines.read_text().splitlines()
    assert [json.loads(line) for line in lines[1:]] == bench.rows
    bench.lines.write_text("\n".join(lines[:-1]) + "\n")
    measured = []
    monkeypatch.setattr(convert_quality.Rows, "add", lambda self, **row: measured.append(row["what"]))
    compare(bench.comparison)
    assert measured == [bench.rows[-1]["what"]]
    bench.lines.write_text("\n".join(lines) + "\n")


def test_other_settings_under_the_same_name_are_refused(bench):
    with pytest.raises(ValueError, match=r"another refine_steps; name another --out"):
        compare(dataclasses.replace(bench.comparison, refine_steps=3))


def test_calibration_text_is_no_held_out_text(comparison):
    with pytest.raises(ValueError, match="calibration text too"):
        compare(dataclasses.replace(comparison, held_out=comparison.calibration))


@pytest.mark.parametrize("size", ["24", "8x8", "8+3", "8+0"])
def test_sizes_that_cannot_be(bench, size):
    with pytest.raises(ValueError, match=r"RANK\+ROPE"):
        convert_quality.Bench(dataclasses.replace(bench.comparison, sizes=(size,), out="sizes-" + size)).sizes()


def test_the_report_has_a_line_for_every_method(bench):
    text = report(bench, "the command")
    for title in ("the command", "## Attention", "## Carve", "## Upcycle", "## Excess loss below the best baseline"):
        assert title in text
    for what in (REPAIRED, SVD, HEALED, TRAINED, *STAGES.values()):
        assert f"| {what} |" in text


def test_the_plot_is_written(bench, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is in the bench extra")
    plot(bench, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_mean_and_half_range():
    assert mean_and_spread([1.0, 2.0, 1.5], 2) == "1.50 ± 0.50"
    assert mean_and_spread([3.0], 1) == "3.0"


def test_excess_is_compared_with_the_best_stock_baseline_of_the_same_seed():
    def row(what, loss, seed=0, part="attention"):
        return {"part": part, "size": "50%", "what": what, "loss": loss, "seed": seed}

    rows = [row("dense", 1.0, part="dense"), row(REPAIRED, 2.0), row(SVD, 3.0), row("ours", 1.5)]
    assert excess_below(rows, "ours") == {"50%": 0.5}
    rows += [row(REPAIRED, 5.0, 1), row(SVD, 3.0, 1), row("ours", 2.0, 1)]
    assert excess_below(rows, "ours") == {"50%": 0.5}
    assert excess_below(rows, "absent") == {}

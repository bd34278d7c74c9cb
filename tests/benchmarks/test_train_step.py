"""The training benchmark, on two narrow layers."""

import pytest
from train_step import COMPILED, OURS, PEERS, Cell, Comparison, compare, report, too_large

COMPARISON = {"sequences": (16,), "step_tokens": 32, "layers": 2, "hidden": 64, "rounds": 2}


def test_every_competitor_trains_from_the_same_weights_and_the_report_has_its_ratios(tmp_path):
    mine = Comparison(**COMPARISON, experts=("32x192",), precisions=("float32",), results=tmp_path)
    head, *rows = compare(mine).rows
    assert [row["competitor"] for row in rows] == [OURS, *PEERS]
    assert all(row["loss"] == pytest.approx(rows[0]["loss"], abs=1e-4) and len(row["seconds"]) == 2 for row in rows)
    assert all(set(row["parts"]) == {"head and loss", "attention", "experts", "optimizer"} for row in rows)
    assert all(0 < row["mfu"] < 1 for row in rows) and head["floor"] > 0
    assert compare(mine).rows == [head, *rows]  # nothing is measured twice
    lines = [
        line for line in report(mine, [head, *rows], "command").splitlines() if line.startswith("| 32x192 | 16 | ")
    ]
    assert len(lines) == 4 and lines[0].split("|")[9].strip() == "1.00"


def test_copies_of_experts_must_fit():
    mine = Comparison(layers=30)
    assert too_large(mine, Cell("8x512", 512, "float32"), "batched_mm")
    assert not too_large(mine, Cell("8x512", 512, "float32"), "grouped_mm")


def test_an_unknown_peer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="sonicmoe"):
        compare(Comparison(**COMPARISON, peers=("sonicmoe" + COMPILED,), results=tmp_path))

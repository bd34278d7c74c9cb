"""The decoding benchmark, on one layer."""

import pytest
from decode import DENSE, OURS, V3, Comparison, compare, report

COMPARISON = {"prompts": (16,), "batches": (2,), "layers": 1, "rounds": 2, "steps": 2}


def test_every_competitor_decodes_and_the_report_has_its_ratios(tmp_path):
    mine = Comparison(**COMPARISON, experts=True, dtype="float32", results=tmp_path)
    rows = compare(mine)
    assert [row["competitor"] for row in rows.rows] == [OURS, V3, DENSE]
    assert all(len(row["seconds"]) == 2 and row["limit"] > 0 for row in rows.rows)
    assert compare(mine).rows == rows.rows  # nothing is measured twice
    lines = [line for line in report(mine, rows.rows, "command").splitlines() if line.startswith("| 2 | 16 | ")]
    assert len(lines) == 3 and lines[0].split("|")[-2].strip() == "1.00"


def test_an_unknown_competitor_is_refused(tmp_path):
    with pytest.raises(ValueError, match="llama"):
        compare(Comparison(**COMPARISON, competitors=("llama",), results=tmp_path))

"""The table of measured memory by processes, without a run."""

from parallel_memory import Memory, counted, report


def row(model, processes, peaks):
    return {"model": model, "precision": "float32", "processes": processes, "frees": True, "peaks": peaks}


def test_a_peak_stands_beside_what_a_plan_counts(tmp_path):
    said = counted(tmp_path, "dense", "float32", 2).total
    alone, two = counted(tmp_path, "dense", "float32", 1), counted(tmp_path, "dense", "float32", 2)
    assert alone.gathered == 0 < two.gathered and two.state == alone.state // 2
    rows = [row("tiny", 2, [30_000_000, 20_000_000]), row("dense", 2, [900_000_000, 2 * said + 30_000_000])]
    last = report(Memory(work=tmp_path), rows, "command").splitlines()[-1]
    assert last.startswith("| dense | float32 | 2 | given back | 900 |") and last.endswith("| 2.00 |")

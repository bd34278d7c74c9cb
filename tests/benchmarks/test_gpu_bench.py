"""The benchmark of one GPU, on the CPU in tiny sizes."""

import dataclasses

import gpu
import pytest
from gpu import FULL, SMALL, Bench, OneGpu, compare, counted, report, targets

TINY = dataclasses.replace(
    SMALL,
    convert=SMALL.convert | {"refine_steps": 1, "distill_steps": 1},
    train=SMALL.train | {"rounds": 1},
    heal_steps=2,
    decode={"layers": 1, "rounds": 1, "steps": 1},
    scratch_steps=2,
)


@pytest.fixture
def mine(tmp_path):
    return OneGpu(device="cpu", sizes=TINY, results=tmp_path / "results", work=tmp_path / "work")


def test_every_row_says_first_what_the_device_allows_and_failed_rows_are_measured_again(mine, monkeypatch, capsys):
    def breaks(*_):
        raise RuntimeError("no kernel\nfor that")

    assert len(compare(dataclasses.replace(mine, minutes=0)).rows) == 1  # the device itself
    with monkeypatch.context() as patch:
        patch.setattr(gpu, "train_for", breaks)
        failed = compare(dataclasses.replace(mine, parts=("heal", "tests"))).rows[1:]
    assert failed[0]["error"] == "RuntimeError: no kernel for that" and "skipped" in failed[1]["note"]
    capsys.readouterr()
    rows = compare(mine).rows
    said = capsys.readouterr().out.splitlines()
    assert [row["what"].partition(",")[0] for row in rows[3:]] == [
        "convert at half the cache",
        *["train"] * 2,
        "packed",
        "heal",
        *["decode"] * 3,
        "scratch-135m",
    ]
    for row in rows[3:]:
        assert row["allows"] > 0 and row["value"] > 0 and "error" not in row
        before, after = (line for line in said if line.startswith(f"  {row['what']}: "))
        assert "the device allows" in before and "the device allows" not in after
    stages = [stage["stage"] for stage in rows[3]["stages"]]
    assert "closed form" in stages and "refine layers" in stages and rows[3]["losses"]["dense"] > 0
    assert len(rows[-1]["losses"]) == TINY.scratch_steps
    assert compare(mine).rows == rows and not list(mine.work.iterdir())
    text = report(mine, rows, "the command")
    assert all(text.count(f"| {row['what']} |") == 1 for row in rows[2:]) and "no kernel" not in text


def test_a_few_steps_lose_the_same_on_two_devices(mine):
    first, row = compare(dataclasses.replace(mine, parts=("convert",), compare_cpu=True)).rows[1:]
    assert row["value"] == 0 and set(row["losses"]) == {"cpu"} and first["what"] != row["what"]


def test_rows_of_another_device_are_not_mixed(mine, monkeypatch):
    compare(dataclasses.replace(mine, minutes=0))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "another")
    monkeypatch.setattr(gpu, "measure_machine", lambda device: None)
    settings = dataclasses.replace(mine, device="cuda")
    with pytest.raises(ValueError, match="device; name another --out"):
        compare(settings)


def test_every_target_finds_its_rows(mine, tmp_path):
    bench = Bench(dataclasses.replace(mine, sizes=FULL), tmp_path)
    names = [measurement.what for part in gpu.EVERY_PART for measurement in gpu.PARTS[part](bench)]
    speeds = {name: 10 if "transformers" in name else 30 for name in names}
    stages = [("closed form", 20), ("refine layers", 40), ("end-to-end KL", 100), ("after end-to-end KL", 5)]
    rows = [{"what": name, "value": value} for name, value in speeds.items()]
    rows.append({"stages": [{"stage": stage, "seconds": seconds} for stage, seconds in stages]})
    assert [told for _, _, told in targets(rows)] == ["60 s", "165 s", "3.00x", "30 tokens/s", "3.00x"]
    assert [told for _, _, told in targets([])] == [""] * 5


def test_tests_are_counted_by_the_last_line():
    told = "9 passed before\nFAILED tests/test_a.py::test_b - boom\n1 failed, 12 passed, 2 skipped in 3.4s\n"
    assert counted(told) == {
        "value": 12,
        "counts": {"failed": 1, "passed": 12, "skipped": 2},
        "failed": ["tests/test_a.py::test_b"],
        "note": "1 failed, 12 passed, 2 skipped, tests/test_a.py::test_b",
    }
    with pytest.raises(ValueError, match="no module"):
        counted("no module named pytest")

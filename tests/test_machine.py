"""How fast a device is."""

import pytest
import torch

from smolseek import machine
from smolseek.machine import measure_machine


def test_this_machine_is_plausible() -> None:
    here = measure_machine(seconds=0.1)
    assert 1e7 < here.flops_per_second < 1e15 and 1e7 < here.bytes_per_second < 1e14
    assert here.device == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one here")
def test_a_device_that_is_not_here_is_refused() -> None:
    with pytest.raises(ValueError, match="device cuda: not available here; use cpu"):
        measure_machine("cuda")


@pytest.mark.parametrize(("flags", "gain"), [("avx512f avx512_bf16", 2), ("fpu amx_bf16 sse", 2), ("avx2 bf16ish", 1)])
def test_units_for_bfloat16_count_twice(flags: str, gain: int, monkeypatch, tmp_path) -> None:
    facts = tmp_path / "cpuinfo"
    facts.write_text(f"flags\t\t: {flags}\n", encoding="utf-8")
    monkeypatch.setattr(machine, "_CPU_FACTS", facts)
    assert measure_machine(seconds=0.01).float64_share == 0.5 / gain


def test_what_other_programs_take_is_told(monkeypatch, tmp_path) -> None:
    times = tmp_path / "stat"
    monkeypatch.setattr(machine, "_CPU_TIMES", times)
    assert measure_machine(seconds=0.01).others == 0
    passed = iter(("cpu  100 0 100 9000 0 0 0 0 0 0", "cpu  1000000 0 100 9000 0 0 0 0 0 0"))
    monkeypatch.setattr(type(times), "read_text", lambda path, **rest: next(passed) if path == times else "")
    monkeypatch.setattr(type(times), "is_file", lambda path: path == times)
    assert measure_machine(seconds=0.01).others == 1

"""Times of a conversion and of healing, beside those that were measured."""

from typing import Any

import pytest

from smolseek.config import ConvertSettings
from smolseek.machine import Machine
from smolseek.planning import plan, render
from tests.configs import SMOLLM2_135M

FAST_COMPUTE = Machine(flops_per_second=1e15, bytes_per_second=1e12)
MEASURED_MACHINE = Machine(flops_per_second=385e9, bytes_per_second=36.26e9, float64_share=0.25, bfloat16=True)
"""What `measure_machine` says of the two cores of the measurements below, with nothing beside."""


@pytest.mark.parametrize(
    ("stage", "measured"), [("sample text", 59), ("closed form", 183), ("refine layers", 200), ("end-to-end KL", 360)]
)
def test_seconds_of_a_stage_are_near_those_that_were_measured(stage: str, measured: float) -> None:
    """SmolLM2-135M-Instruct at half its cache, 807 s in all (LOG.md)."""
    told = plan(SMOLLM2_135M, ConvertSettings(cache=0.5), MEASURED_MACHINE)
    assert 1 / 1.5 < told.stages[stage] / measured < 1.5
    assert told.convert.seconds == sum(told.stages.values()) and 1 / 1.5 < told.convert.seconds / 807 < 1.5
    assert f"{stage} " in render(told)


def test_seconds_without_bf16_units_are_near_those_that_were_measured() -> None:
    """The same on two cores with AVX2 alone: 1,673 s (LOG.md)."""
    machine = Machine(flops_per_second=141e9, bytes_per_second=38.8e9, float64_share=0.5)
    assert 1 / 1.5 < plan(SMOLLM2_135M, ConvertSettings(cache=0.5), machine).convert.seconds / 1673 < 1.5


def test_carving_takes_about_as_long_as_it_did() -> None:
    """It took 2,037 s with exact attention, which calibrates nothing, tests beside (LOG.md)."""
    told = plan(SMOLLM2_135M, ConvertSettings(experts="carve", exact=True), MEASURED_MACHINE)
    assert 1 / 1.5 < told.convert.seconds / 2037 < 1.5 and "closed form" not in told.stages


def test_costs_grow_with_the_work() -> None:
    def cost(heal_tokens: int = 1000, **fields: Any) -> tuple[float, float, int]:
        result = plan(SMOLLM2_135M, ConvertSettings(**fields), FAST_COMPUTE, heal_tokens=heal_tokens)
        return result.convert.seconds, result.heal.seconds, result.heal.memory_bytes

    convert, heal, memory = cost()
    assert cost(heal_tokens=3000)[1] == pytest.approx(3 * heal)
    assert cost(calibration_windows=256)[0] > convert > cost(exact=True)[0] > 0
    assert cost(experts="upcycle")[2] > memory > 16 * 134_515_008
    # Six flops per weight and token, at half the peak; activations and scores are moved twenty times, in fp32.
    moved = 20 * 4 * 30 * (12 * 576 + 4 * 1536 + 9 * 256)
    assert heal == pytest.approx(1000 * (6 * 139_633_488 / 5e14 + moved / FAST_COMPUTE.bytes_per_second))


def test_the_closed_form_takes_a_pass_for_each_stride_of_the_rope_slots() -> None:
    """A head of 64 has one plan of slots for a rotated key of 32, and five with three strides for one of 16."""
    wide, narrow = (
        plan(SMOLLM2_135M, ConvertSettings(kv_lora_rank=32, qk_rope_head_dim=rope_dim), MEASURED_MACHINE)
        for rope_dim in (32, 16)
    )
    assert 3 < narrow.stages["closed form"] / wide.stages["closed form"] < 5

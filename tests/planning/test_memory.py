"""Memory of a conversion and of a training's processes, beside what was measured."""

from typing import Any

import pytest

from smolseek.config import ConvertSettings, TrainSettings
from smolseek.machine import Machine
from smolseek.planning import TrainingMemory, plan, render
from tests.configs import SMOLLM2_135M

FAST_COMPUTE = Machine(flops_per_second=1e15, bytes_per_second=1e12)


def test_processes_divide_state_and_work_and_gather_the_rest() -> None:
    train = TrainSettings(batch_windows=8, window_tokens=256, precision="float32")
    alone, four = (plan(SMOLLM2_135M, ConvertSettings(), FAST_COMPUTE, train=train, processes=n) for n in (1, 4))
    assert four.heal.seconds == pytest.approx(alone.heal.seconds / 4)
    one, each = alone.heal_memory, four.heal_memory
    assert (one.state, one.gathered, one.casts, one.teacher) == (16 * 139_633_488, 0, 0, 0)
    assert each.state == one.state // 4 and each.activations == one.activations // 4
    tables, layer = 49152 * 576, (139_633_488 - 49152 * 576) // 30
    assert each.gathered == 4 * (4 * tables + 7 * layer) and each.total == four.heal.memory_bytes
    text = render(four)
    assert f"{four.heal.memory_bytes / 1e9:.2f} GB of memory in each of 4" in text and "state 558.5 MB" in text


def test_what_a_recipe_trains_with_counts() -> None:
    def memory(processes: int = 2, **fields: Any) -> TrainingMemory:
        train = TrainSettings(batch_windows=8, **fields)
        return plan(SMOLLM2_135M, ConvertSettings(), FAST_COMPUTE, train=train, processes=processes).heal_memory

    plain = memory(precision="float32")
    assert memory(precision="bfloat16").casts == 2 * 139_633_488
    assert memory(activation_checkpointing=True).activations < plain.activations / 10
    assert memory(precision="bfloat16", activation_checkpointing=True).casts < 139_633_488
    distilled = memory(precision="float32", distill_weight=0.9)
    assert distilled.teacher > 4 * 134_515_008 / 2 and distilled.logits > plain.logits
    assert memory(precision="float32", distill_weight=0.9, processes=8).teacher < 0.6 * distilled.teacher
    cuda = Machine(1e15, 1e12, device="cuda", bfloat16=True)
    assert plan(SMOLLM2_135M, ConvertSettings(), cuda).heal_memory.casts  # bf16 by itself
    assert plan(SMOLLM2_135M, ConvertSettings(), FAST_COMPUTE, processes=3).heal_memory.state == 16 * 139_633_488 // 3


@pytest.mark.parametrize(
    ("shape", "layers", "fields", "measured_gb"),
    [
        ("135M", 30, {"refine_steps": 0}, 1.56),
        ("1.7B", 24, {"refine_steps": 0}, 12.84),
        ("1.7B", 2, {"refine_steps": 0}, 4.19),
        ("135M", 30, {"cache": 0.5}, 4.47),
    ],
)
def test_memory_to_convert_is_what_was_measured(
    shape: str, layers: int, fields: dict[str, Any], measured_gb: float
) -> None:
    """Peaks from benchmarks/results: moments in memory, in files, and a fit that needs more than calibration; and of
    a whole conversion with its end-to-end stage, from LOG.md."""
    wide = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 32}
    source = SMOLLM2_135M | (wide if shape == "1.7B" else {}) | {"num_hidden_layers": layers}
    memory = plan(source, ConvertSettings(**fields), FAST_COMPUTE).convert.memory_bytes
    assert memory == pytest.approx(1e9 * measured_gb, rel=0.1)

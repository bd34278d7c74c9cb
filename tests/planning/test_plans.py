"""What a plan tells before anything runs."""

import json
import subprocess
import sys
from typing import Any

import pytest

from smolseek.config import ConvertSettings, TrainSettings
from smolseek.machine import Machine
from smolseek.planning import plan, render
from tests.configs import SMOLLM2_135M, TINY

FAST_COMPUTE = Machine(flops_per_second=1e15, bytes_per_second=1e12)


def test_profile_vllm_is_one_that_vllm_loads() -> None:
    told = plan(SMOLLM2_135M, ConvertSettings(profile="vllm"), FAST_COMPUTE)
    assert all(said.startswith("loads") for said in told.runtimes.values())
    assert "profile          vllm" in render(told)


def test_a_machine_that_others_use_is_said_to_be_one() -> None:
    text = render(plan(SMOLLM2_135M, ConvertSettings(), Machine(1e15, 1e12, others=0.4)))
    assert "others took 40% of the processors meanwhile" in text and "times the dense speed" not in text


def test_processes_that_cannot_share_a_batch_are_refused() -> None:
    for processes in (3, 0):
        with pytest.raises(ValueError, match=rf"processes {processes}: train.batch_windows, 8, must be a multiple"):
            plan(SMOLLM2_135M, ConvertSettings(), FAST_COMPUTE, train=TrainSettings(), processes=processes)


def test_plan_is_json_and_text_for_every_runtime() -> None:
    result = plan(SMOLLM2_135M, ConvertSettings(experts="upcycle"), FAST_COMPUTE)
    told = json.loads(json.dumps(result.to_dict()))
    assert told["runtimes"]["transformers"] == "loads" and told["runtimes"]["vllm"].startswith("refuses")
    assert told["target"]["active_parameters"] < told["target"]["total_parameters"]
    text = render(result)
    pieces = ("134,515,008", "39.6%", "sglang", "llama.cpp", f"from {result.decoding[1].faster_from_tokens:,} tokens")
    assert all(piece in text for piece in pieces)


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="kv_lora_rank 999"):
        plan(SMOLLM2_135M, ConvertSettings(kv_lora_rank=999), FAST_COMPUTE)


@pytest.mark.parametrize(
    ("fields", "settings", "message"),
    [
        ({"hidden_size": 63}, ConvertSettings(experts="upcycle"), "hidden_size 63: transformers runs experts only"),
        ({"hidden_size": 36}, ConvertSettings(experts="carve"), "hidden_size 36: .* multiple of 8; leave out experts"),
        ({"max_position_embeddings": "512"}, ConvertSettings(), "max_position_embeddings '512'"),
        ({"num_hidden_layers": 10**9}, ConvertSettings(), "num_hidden_layers 1000000000"),
        ({"model_type": "deepseek_v3"}, ConvertSettings(), "is DeepSeek-V3 already"),
    ],
)
def test_configs_that_cannot_be_planned_are_refused_in_one_line(
    fields: dict[str, Any], settings: ConvertSettings, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        plan(TINY | fields, settings, FAST_COMPUTE)
    assert "\n" not in str(refusal.value)


def test_a_device_plans_with_its_own_rates() -> None:
    rates = {"flops_per_second": 1e15, "bytes_per_second": 1e12}
    even, poor = (Machine(**rates, float64_share=share, device="cuda") for share in (0.5, 0.01))
    costs = [plan(SMOLLM2_135M, ConvertSettings(), machine).convert for machine in (even, poor)]
    assert costs[1].seconds > costs[0].seconds > plan(SMOLLM2_135M, ConvertSettings(exact=True), even).convert.seconds
    closed = ConvertSettings(refine_steps=0)
    memory, more = (plan(SMOLLM2_135M, closed, machine).convert.memory_bytes for machine in (FAST_COMPUTE, even))
    assert more > memory
    assert "cuda, 1,000,000 GFLOP/s" in render(plan(SMOLLM2_135M, ConvertSettings(), even))


def test_no_torch() -> None:
    code = "import sys, smolseek.planning, smolseek.formats.runtimes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""What a plan tells before anything runs: sizes, cache, the length from which it pays, cost."""

import json
import subprocess
import sys
from typing import Any

import pytest
from transformers import AutoConfig, DeepseekV3Config

from smolseek.config import ConvertSettings
from smolseek.conversion.target import target_config
from smolseek.formats.deepseek_v3 import count_parameters
from smolseek.formats.dense import read_source
from smolseek.machine import Machine
from smolseek.planning import cache_bytes_per_token, payoff_context_tokens, plan, render
from tests.configs import SMOLLM2_135M, TINY
from tests.factories import stock_parameters

FAST_COMPUTE = Machine(flops_per_second=1e15, bytes_per_second=1e12)
FAST_MEMORY = Machine(flops_per_second=1e11, bytes_per_second=1e12)


def test_smollm2_135m() -> None:
    result = plan(SMOLLM2_135M, ConvertSettings(), FAST_COMPUTE)
    assert result.source.total_parameters == result.source.active_parameters == 134_515_008
    assert (result.source.cache_numbers_per_token_and_layer, result.source.cache_bytes_per_token) == (384, 23_040)
    assert (result.target.cache_numbers_per_token_and_layer, result.target.cache_bytes_per_token) == (152, 9_120)
    assert result.target.cache_bytes_at_max_context == 9_120 * 8_192
    assert result.cache_share == pytest.approx(152 / 384)
    assert result.config == target_config(read_source(SMOLLM2_135M), ConvertSettings())


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "qwen2"},
        {"attention_bias": True},
        {"model_type": "smollm3", "no_rope_layers": [1, 0], "pad_token_id": None},
        {"model_type": "mistral", "sliding_window": None},
        {"model_type": "qwen3"},
    ],
)
@pytest.mark.parametrize("exact", [False, True])
def test_parameters_of_every_family(fields: dict[str, Any], exact: bool) -> None:
    source = TINY | fields
    exact = exact and not read_source(source).qk_norms
    result = plan(source, ConvertSettings(exact=exact), FAST_COMPUTE)
    assert result.source.total_parameters == stock_parameters(AutoConfig.for_model(**source))
    assert result.target.total_parameters == stock_parameters(DeepseekV3Config.from_dict(result.config))
    assert result.profile == ("transformers" if exact else "portable")


def test_carving_adds_routers_alone_and_a_token_meets_its_share() -> None:
    dense, carved = (plan(SMOLLM2_135M, ConvertSettings(experts=e), FAST_COMPUTE).target for e in ("none", "carve"))
    assert carved.total_parameters - dense.total_parameters == 30 * 24 * 576
    assert dense.total_parameters - carved.active_parameters == 30 * (576 * 1536 * 3 // 4 - 24 * 576)
    kept = plan(SMOLLM2_135M, ConvertSettings(experts="carve", first_k_dense_replace=2), FAST_COMPUTE)
    assert "8 shared + 16 of 24 routed experts of 48 neurons behind 2 dense layers" in render(kept)


def test_profile_vllm_is_one_that_vllm_loads() -> None:
    told = plan(SMOLLM2_135M, ConvertSettings(profile="vllm"), FAST_COMPUTE)
    assert all(said.startswith("loads") for said in told.runtimes.values())
    assert "profile          vllm" in render(told)


def test_cache_bytes() -> None:
    assert cache_bytes_per_token(TINY) == 2 * 2 * 2 * 16 * 2  # layers, key and value, KV heads, head_dim, bf16
    target = target_config(read_source(TINY), ConvertSettings(kv_lora_rank=20, qk_rope_head_dim=4))
    assert cache_bytes_per_token(target) == 2 * 24 * 2


def test_payoff_is_where_the_two_decoding_times_meet() -> None:
    settings = ConvertSettings(kv_lora_rank=120, qk_rope_head_dim=32)
    target = target_config(read_source(SMOLLM2_135M), settings)
    length = payoff_context_tokens(SMOLLM2_135M, target, FAST_COMPUTE)
    assert length is not None

    def seconds(tokens: int, weights: int, numbers: int, flops: int) -> float:
        start = 2 * weights * (1 / 1e12 + 1 / 1e15)
        return start + tokens * 30 * (2 * numbers / 1e12 + flops / 1e15)

    dense = [seconds(t, 134_515_008, 384, 4 * 9 * 64) for t in (length - 1, length)]
    weights = count_parameters(target)[0]
    latent = [seconds(t, weights, 152, 2 * 9 * 152 + 2 * 9 * 120) for t in (length - 1, length)]
    assert latent[0] > dense[0] and latent[1] <= dense[1]


def test_payoff_never_where_arithmetic_costs_more_than_the_cache_saves() -> None:
    target = target_config(read_source(SMOLLM2_135M), ConvertSettings())
    assert payoff_context_tokens(SMOLLM2_135M, target, FAST_MEMORY) is None
    assert "never" in render(plan(SMOLLM2_135M, ConvertSettings(), FAST_MEMORY))


def test_payoff_at_once_where_there_are_fewer_weights_too() -> None:
    source = TINY | {"num_key_value_heads": 4, "hidden_size": 512}
    target = target_config(read_source(source), ConvertSettings(kv_lora_rank=8, qk_rope_head_dim=2))
    assert count_parameters(target)[0] < read_source(source).parameters()
    assert payoff_context_tokens(source, target, FAST_COMPUTE) == 0


def test_an_untied_embedding_table_is_not_read_while_decoding() -> None:
    wide = SMOLLM2_135M | {"tie_word_embeddings": False}
    lengths = [
        payoff_context_tokens(source, target_config(read_source(source), ConvertSettings()), FAST_COMPUTE)
        for source in (SMOLLM2_135M, wide, wide | {"vocab_size": 2 * 49152})
    ]
    assert lengths[0] is not None and len(set(lengths)) == 1


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


@pytest.mark.parametrize(
    ("shape", "layers", "measured_gb"),
    [("135M", 30, 1.56), ("1.7B", 24, 12.84), ("1.7B", 2, 4.19)],
)
def test_memory_to_convert_is_what_was_measured(shape: str, layers: int, measured_gb: float) -> None:
    """Peaks from benchmarks/results: moments in memory, in files, and a fit that needs more than calibration."""
    wide = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 32}
    source = SMOLLM2_135M | (wide if shape == "1.7B" else {}) | {"num_hidden_layers": layers}
    memory = plan(source, ConvertSettings(), FAST_COMPUTE).convert.memory_bytes
    assert memory == pytest.approx(1e9 * measured_gb, rel=0.1)


def test_plan_is_json_and_text_for_every_runtime() -> None:
    result = plan(SMOLLM2_135M, ConvertSettings(experts="upcycle"), FAST_COMPUTE)
    told = json.loads(json.dumps(result.to_dict()))
    assert told["runtimes"]["transformers"] == "loads" and told["runtimes"]["vllm"].startswith("refuses")
    assert told["target"]["active_parameters"] < told["target"]["total_parameters"]
    text = render(result)
    pieces = ("134,515,008", "39.6%", "sglang", "llama.cpp", f"from {result.payoff_context_tokens:,} tokens")
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
    assert costs[0].memory_bytes > plan(SMOLLM2_135M, ConvertSettings(), FAST_COMPUTE).convert.memory_bytes
    assert "cuda, 1,000,000 GFLOP/s" in render(plan(SMOLLM2_135M, ConvertSettings(), even))


def test_no_torch() -> None:
    code = "import sys, smolseek.planning, smolseek.formats.runtimes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

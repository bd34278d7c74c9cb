"""What a plan tells before anything runs: sizes, cache, what decoding gains, cost."""

import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from transformers import AutoConfig, DeepseekV3Config

from smolseek.config import ConvertSettings, TrainSettings
from smolseek.conversion.target import target_config
from smolseek.formats.deepseek_v3 import count_parameters
from smolseek.formats.dense import read_source
from smolseek.machine import Machine
from smolseek.planning import FASTER, TrainingMemory, cache_bytes_per_token, count_decoding, plan, render
from tests.configs import SMOLLM2_135M, TINY
from tests.factories import stock_parameters

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
CELL = ("competitor", "kind", "cached", "batch")
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


def test_decoding_is_counted_in_bytes_and_operations() -> None:
    settings = ConvertSettings(kv_lora_rank=120, qk_rope_head_dim=32)
    target = target_config(read_source(SMOLLM2_135M), settings)

    def seconds(sequences: int, tokens: int, weights: int, numbers: int, flops: int) -> float:
        start = 2 * weights * (1 / 1e12 + sequences / 1e15)
        return start + sequences * tokens * 30 * (2 * numbers / 1e12 + flops / 1e15)

    weights = count_parameters(target)[0]
    for sequences, tokens in ((1, 0), (1, 8192), (8, 512), (64, 8192)):
        dense = seconds(sequences, tokens, 134_515_008, 384, 4 * 9 * 64)
        latent = seconds(sequences, tokens, weights, 152, 2 * 9 * 152 + 2 * 9 * 120)
        counted = count_decoding(SMOLLM2_135M, target, FAST_COMPUTE, sequences, tokens)
        assert counted == pytest.approx(dense / latent)
    for part in plan(SMOLLM2_135M, settings, FAST_COMPUTE).decoding:
        assert part.gain == count_decoding(SMOLLM2_135M, target, FAST_COMPUTE, part.sequences, 8192)
        length = part.faster_from_tokens
        assert length is not None
        gains = [count_decoding(SMOLLM2_135M, target, FAST_COMPUTE, part.sequences, t) for t in (length - 1, length)]
        assert gains[0] < FASTER <= gains[1]


def test_no_gain_where_arithmetic_costs_more_than_the_cache_saves() -> None:
    told = plan(SMOLLM2_135M, ConvertSettings(), FAST_MEMORY)
    assert all(part.gain < 1 and part.faster_from_tokens is None for part in told.decoding)
    assert "2.5 times the tokens or sequences in the same memory" in render(told)
    assert "memory is gained, not time" in render(told)


def test_a_length_that_the_model_does_not_take_is_not_told() -> None:
    short = SMOLLM2_135M | {"max_position_embeddings": 512}
    assert plan(short, ConvertSettings(), FAST_COMPUTE).decoding[0].faster_from_tokens is None


def test_an_untied_embedding_table_is_not_read_while_decoding() -> None:
    wide = SMOLLM2_135M | {"tie_word_embeddings": False}
    gains = [
        plan(source, ConvertSettings(), FAST_COMPUTE).decoding[0].gain
        for source in (SMOLLM2_135M, wide, wide | {"vocab_size": 2 * 49152})
    ]
    assert gains[0] == gains[1] > gains[2]


def test_several_sequences_read_the_experts_of_each() -> None:
    dense, upcycled = (plan(SMOLLM2_135M, ConvertSettings(experts=e), FAST_COMPUTE) for e in ("none", "upcycle"))
    assert upcycled.decoding[0].gain == pytest.approx(dense.decoding[0].gain, rel=0.01)  # but for the router
    assert upcycled.decoding[1].gain < 0.95 * dense.decoding[1].gain


MEASURED_MACHINE = Machine(flops_per_second=385e9, bytes_per_second=36.26e9, float64_share=0.25)
"""What `measure_machine` says of the two cores of the measurements below, with nothing beside."""


def test_no_gain_in_time_is_told_where_none_was_measured() -> None:
    """SmolLM2-135M at half its cache in llama.cpp with flash attention gains no time, and the plan counts as much."""
    told = plan(SMOLLM2_135M, ConvertSettings(cache=0.5), MEASURED_MACHINE)
    assert all(part.faster_from_tokens is None for part in told.decoding)
    lines = (RESULTS / "2026-11-28-llamacpp-speed-smollm2.jsonl").read_text().splitlines()[1:]
    steps = {tuple(row[key] for key in CELL): median(row["seconds"]) for row in map(json.loads, lines) if row["flash"]}
    dense = [cell for cell in steps if cell[0] == "dense, llama.cpp"]
    assert len(dense) == 8
    for _, kind, cached, batch in dense:
        measured = steps["dense, llama.cpp", kind, cached, batch] / steps["converted, llama.cpp", kind, cached, batch]
        counted = count_decoding(SMOLLM2_135M, told.config, MEASURED_MACHINE, batch, cached)
        assert abs(measured - counted) < 0.1 and measured < FASTER


@pytest.mark.parametrize(
    ("stage", "measured"), [("sample text", 91), ("closed form", 203), ("refine layers", 170), ("end-to-end KL", 420)]
)
def test_seconds_of_a_stage_are_near_those_that_were_measured(stage: str, measured: float) -> None:
    """SmolLM2-135M-Instruct at half its cache, 912 s in all (LOG.md, and benchmarks/results/2026-11-28-smollm2.md)."""
    told = plan(SMOLLM2_135M, ConvertSettings(cache=0.5), MEASURED_MACHINE)
    assert 1 / 1.5 < told.stages[stage] / measured < 1.5
    assert told.convert.seconds == sum(told.stages.values()) and 1 / 1.5 < told.convert.seconds / 912 < 1.5
    assert f"{stage} " in render(told)


def test_a_machine_that_others_use_is_said_to_be_one() -> None:
    text = render(plan(SMOLLM2_135M, ConvertSettings(), Machine(1e15, 1e12, others=0.4)))
    assert "others took 40% of the processors meanwhile" in text and "times the dense speed" not in text


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
    cuda = Machine(1e15, 1e12, device="cuda")
    assert plan(SMOLLM2_135M, ConvertSettings(), cuda).heal_memory.casts  # bf16 by itself
    assert plan(SMOLLM2_135M, ConvertSettings(), FAST_COMPUTE, processes=3).heal_memory.state == 16 * 139_633_488 // 3


def test_processes_that_cannot_share_a_batch_are_refused() -> None:
    for processes in (3, 0):
        with pytest.raises(ValueError, match=rf"processes {processes}: train.batch_windows, 8, must be a multiple"):
            plan(SMOLLM2_135M, ConvertSettings(), FAST_COMPUTE, train=TrainSettings(), processes=processes)


@pytest.mark.parametrize(
    ("shape", "layers", "steps", "measured_gb"),
    [("135M", 30, 0, 1.56), ("1.7B", 24, 0, 12.84), ("1.7B", 2, 0, 4.19), ("135M", 30, None, 5.19)],
)
def test_memory_to_convert_is_what_was_measured(shape: str, layers: int, steps: int | None, measured_gb: float) -> None:
    """Peaks from benchmarks/results: moments in memory, in files, and a fit that needs more than calibration; and of
    the end-to-end stage, from LOG.md."""
    wide = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 32}
    source = SMOLLM2_135M | (wide if shape == "1.7B" else {}) | {"num_hidden_layers": layers}
    memory = plan(source, ConvertSettings(refine_steps=steps), FAST_COMPUTE).convert.memory_bytes
    assert memory == pytest.approx(1e9 * measured_gb, rel=0.1)


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

"""Parameters and cache of dense and converted models."""

from typing import Any

import pytest
from transformers import AutoConfig, DeepseekV3Config

from smolseek.config import ConvertSettings
from smolseek.conversion.target import target_config
from smolseek.formats.dense import read_source
from smolseek.machine import Machine
from smolseek.planning import cache_bytes_per_token, plan, render
from tests.configs import SMOLLM2_135M, TINY
from tests.factories import stock_parameters

FAST_COMPUTE = Machine(flops_per_second=1e15, bytes_per_second=1e12)


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


def test_cache_bytes() -> None:
    assert cache_bytes_per_token(TINY) == 2 * 2 * 2 * 16 * 2  # layers, key and value, KV heads, head_dim, bf16
    target = target_config(read_source(TINY), ConvertSettings(kv_lora_rank=20, qk_rope_head_dim=4))
    assert cache_bytes_per_token(target) == 2 * 24 * 2

"""Names, shapes and counts of a DeepSeek-V3 folder's tensors."""

from typing import Any

import pytest
from transformers import DeepseekV3Config, LlamaConfig

from smolseek.checkpoint.hub import named_disk_tensors
from smolseek.config import ConvertSettings
from smolseek.conversion.target import target_config
from smolseek.formats.deepseek_v3 import DEFAULTS, count_parameters, disk_config, expected_tensors, is_latent
from smolseek.formats.dense import read_source
from tests.configs import TINY
from tests.factories import stock_parameters, tiny_v3


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"q_lora_rank": 20},
        {"attention_bias": True},
        {"q_lora_rank": 20, "attention_bias": True, "tie_word_embeddings": True},
        {"first_k_dense_replace": 3},
        {"first_k_dense_replace": 0, "n_shared_experts": 3},
    ],
)
def test_expected_tensors_are_what_a_folder_holds(overrides):
    model = tiny_v3(**overrides)
    shapes = {name: tuple(tensor.shape) for name, tensor in named_disk_tensors(model)}
    assert expected_tensors(disk_config(model.config.to_dict())) == shapes


def test_fields_left_out_are_what_transformers_takes():
    config = DeepseekV3Config()
    assert {field: getattr(config, field) for field in DEFAULTS} == DEFAULTS


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": "wide"}, "hidden_size 'wide': must be an integer"),
        ({"hidden_size": None}, "hidden_size None: must be an integer"),
        ({"vocab_size": 2**40}, "vocab_size 1099511627776: must be an integer"),
        ({"kv_lora_rank": -1}, "kv_lora_rank -1"),
        ({"kv_lora_rank": 2.0}, "kv_lora_rank 2.0"),
        ({"num_attention_heads": True}, "num_attention_heads True"),
        ({"tie_word_embeddings": "true"}, "tie_word_embeddings 'true': must be true or false"),
        ({"attention_bias": None}, "attention_bias None"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps nan: must be a number"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers 1000000: must be an integer from 0 to 10,000"),
        ({"n_routed_experts": 10**6}, "n_routed_experts 1,000,000: too many for 58 layers"),
    ],
)
def test_a_size_that_is_no_number_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        expected_tensors(fields)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "settings",
    [
        ConvertSettings(),
        ConvertSettings(exact=True),
        ConvertSettings(experts="upcycle"),
        ConvertSettings(experts="upcycle", moe_intermediate_size=8, n_shared_experts=2),
        ConvertSettings(experts="carve", active=0.5),
        ConvertSettings(profile="vllm", kv_lora_rank=256, q_lora_rank=24, v_head_dim=128),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_that_transformers_builds(settings: ConvertSettings, tied: bool) -> None:
    source = TINY | {"tie_word_embeddings": tied}
    target = target_config(read_source(source), settings)
    assert read_source(source).parameters() == stock_parameters(LlamaConfig.from_dict(source))
    total, active = count_parameters(target)
    assert total == stock_parameters(DeepseekV3Config.from_dict(target))
    unused = target["n_routed_experts"] - target["num_experts_per_tok"] if settings.experts != "none" else 0
    assert total - active == 2 * unused * 3 * 64 * target["moe_intermediate_size"]


def test_parameters_with_a_query_rank_and_a_dense_first_layer() -> None:
    target = target_config(read_source(TINY), ConvertSettings(experts="upcycle")) | {"first_k_dense_replace": 1}
    for fields in ({"q_lora_rank": 24}, {"q_lora_rank": 24, "attention_bias": True}):
        config = DeepseekV3Config.from_dict(target | fields)
        assert count_parameters(config.to_dict())[0] == stock_parameters(config)


def test_a_dense_config_that_names_no_latent_is_dense() -> None:
    assert is_latent({"kv_lora_rank": 8}) and not is_latent({}) and not is_latent({"kv_lora_rank": None})

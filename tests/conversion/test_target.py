"""The config that a conversion writes: sizes, refusals, and what transformers makes of it."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DeepseekV3Config, LlamaConfig, MistralConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from smolseek.config import ConvertSettings
from smolseek.conversion.target import CACHE_SHARE, read_source, target_config
from tests.configs import SMOLLM2_135M, TINY


def test_fields_match_transformers_after_a_round_trip() -> None:
    written = target_config(TINY, ConvertSettings(experts="upcycle"))
    read = DeepseekV3Config.from_dict(written).to_dict()
    differing = {
        k: (v, read.get(k)) for k, v in written.items() if k not in ("rope_theta", "torch_dtype") and read.get(k) != v
    }
    assert differing == {}
    assert read["rope_parameters"] == {"rope_type": "default", "rope_theta": 5000.0}


@pytest.mark.parametrize(("kind", "config_class"), [("llama", LlamaConfig), ("mistral", MistralConfig)])
def test_fields_left_out_are_those_of_transformers(kind: str, config_class: type) -> None:
    required = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    given_fields = {name: TINY[name] for name in required} | {"num_attention_heads": 8, "sliding_window": None}
    source = read_source(given_fields | {"model_type": kind})
    stock = config_class(**given_fields).to_dict()
    shared = sorted((set(source) & set(stock)) - {"dtype", "rope"})
    assert {name: source[name] for name in shared} == {name: stock[name] for name in shared}
    assert source["rope"] == stock["rope_parameters"]


def test_old_and_new_rope_fields_say_the_same() -> None:
    old = {**TINY, "rope_scaling": {"type": "linear", "factor": 2.0}}
    new = {k: v for k, v in TINY.items() if k != "rope_theta"}
    new["rope_parameters"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
    assert read_source(old)["rope"] == read_source(new)["rope"]


@given(
    kv_heads=st.integers(1, 6),
    group=st.integers(1, 3),
    head_dim=st.sampled_from([8, 16, 32, 64, 96, 128]),
    hidden=st.integers(4, 40).map(lambda n: 64 * n),
)
def test_default_sizes_keep_their_share_of_the_cache(kv_heads: int, group: int, head_dim: int, hidden: int) -> None:
    heads = {"num_attention_heads": kv_heads * group, "num_key_value_heads": kv_heads, "head_dim": head_dim}
    config = target_config({**TINY, **heads, "hidden_size": hidden}, ConvertSettings())
    rank, rope_dim, numbers = config["kv_lora_rank"], config["qk_rope_head_dim"], 2 * kv_heads * head_dim
    assert rope_dim % 2 == 0 and head_dim % rope_dim == 0 and rope_dim <= head_dim // 2
    assert rank % 8 == 0 or rank == hidden
    assert 8 <= rank <= min(hidden, numbers)
    if 8 < rank < hidden:
        assert abs(rank + rope_dim - CACHE_SHARE * numbers) <= 4


def test_smollm2_sizes() -> None:
    config = target_config(SMOLLM2_135M, ConvertSettings())
    wanted = {"qk_rope_head_dim": 32, "kv_lora_rank": 120, "qk_nope_head_dim": 64, "v_head_dim": 64}
    assert {name: config[name] for name in wanted} == wanted
    assert config["first_k_dense_replace"] == config["num_hidden_layers"]


def test_given_sizes_and_theta_are_kept() -> None:
    config = target_config(TINY, ConvertSettings(kv_lora_rank=64, qk_rope_head_dim=16), rope_theta=77.0)
    assert (config["kv_lora_rank"], config["qk_rope_head_dim"]) == (64, 16)
    assert config["rope_parameters"]["rope_theta"] == config["rope_theta"] == 77.0


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
)
def test_exact_frequencies_are_the_source_s_for_every_kv_head(scaling: dict[str, Any]) -> None:
    rope = {"rope_parameters": scaling | {"rope_theta": 5000.0}}
    source = {k: v for k, v in TINY.items() if k not in ("rope_theta", "model_type")} | rope
    written = target_config(source | {"model_type": "llama"}, ConvertSettings(exact=True))
    assert (written["qk_rope_head_dim"], written["kv_lora_rank"], written["attention_bias"]) == (32, 33, True)
    dense = LlamaRotaryEmbedding(LlamaConfig(**source))
    latent = DeepseekV3RotaryEmbedding(DeepseekV3Config.from_dict(written))
    torch.testing.assert_close(latent.inv_freq, dense.inv_freq.repeat(2), rtol=5e-7, atol=0)
    assert latent.attention_scaling == 1.0


@pytest.mark.parametrize(
    ("neurons", "expected"),
    [(96, (4, 16, 4, 12, 4, 4.0)), (172, (2, 8, 2, 43, 4, 2.0))],
)
def test_upcycle_defaults(neurons: int, expected: tuple[float, ...]) -> None:
    config = target_config({**TINY, "intermediate_size": neurons}, ConvertSettings(experts="upcycle"))
    fields = (
        "n_shared_experts",
        "n_routed_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "n_group",
        "routed_scaling_factor",
    )
    assert tuple(config[name] for name in fields) == expected
    assert (config["topk_group"], config["first_k_dense_replace"]) == (1, 0)


@given(
    shared=st.none() | st.integers(0, 6),
    chosen=st.none() | st.integers(1, 6),
    copies=st.none() | st.integers(1, 3),
    width=st.none() | st.integers(1, 100),
)
def test_upcycled_experts_meet_the_dense_neurons_or_are_refused(
    shared: int | None, chosen: int | None, copies: int | None, width: int | None
) -> None:
    settings = ConvertSettings(
        experts="upcycle",
        n_shared_experts=shared,
        num_experts_per_tok=chosen,
        moe_intermediate_size=width,
        n_routed_experts=None if copies is None or chosen is None else copies * chosen,
    )
    try:
        config = target_config(TINY, settings)
    except ValueError as error:
        assert "\n" not in str(error)
        sizes = (shared, chosen, width)
        assert any(size is not None for size in sizes), "the defaults always fit 96 neurons"
        if None not in sizes:
            assert chosen < 2 or (shared + chosen) * width != 96  # type: ignore[operator]
        return
    per_token = config["num_experts_per_tok"]
    assert (config["n_shared_experts"] + per_token) * config["moe_intermediate_size"] == 96
    assert config["n_routed_experts"] == config["n_group"] * per_token and per_token >= 2
    for name, value in (
        ("n_shared_experts", shared),
        ("num_experts_per_tok", chosen),
        ("moe_intermediate_size", width),
    ):
        assert value is None or config[name] == value


REFUSED_SOURCES: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "qwen2"}, "qwen2.*llama, mistral"),
    ({"hidden_size": None}, "hidden_size None"),
    ({"vocab_size": "many"}, "vocab_size 'many'"),
    ({"num_key_value_heads": 3}, "3 KV heads"),
    ({"head_dim": 15}, "head_dim 15"),
    ({"attention_bias": True}, "attention_bias True"),
    ({"mlp_bias": True}, "mlp_bias True"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"model_type": "mistral", "sliding_window": 4096}, "sliding_window 4096"),
    ({"model_type": "mistral"}, "sliding_window 4096"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "linear.*--exact"),
    ({"intermediate_size": 0}, "intermediate_size 0"),
]
REFUSED_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"qk_rope_head_dim": 3}, "qk_rope_head_dim 3.*2, 4, 8, 16"),
    ({"qk_rope_head_dim": 6}, "qk_rope_head_dim 6"),
    ({"qk_rope_head_dim": 32}, "qk_rope_head_dim 32"),
    ({"qk_rope_head_dim": 0}, "qk_rope_head_dim 0"),
    ({"kv_lora_rank": 0}, "kv_lora_rank 0.*1 to 64"),
    ({"kv_lora_rank": 65}, "kv_lora_rank 65.*1 to 64"),
    ({"exact": True, "kv_lora_rank": 8}, "exact"),
    ({"exact": True, "qk_rope_head_dim": 8}, "exact"),
    ({"n_routed_experts": 4}, "n_routed_experts 4.*upcycle"),
    ({"experts": "upcycle", "moe_intermediate_size": 7}, "moe_intermediate_size 7.*1, 2, 3, 4, 6"),
    ({"experts": "upcycle", "n_routed_experts": 6}, "n_routed_experts 6.*4"),
    ({"experts": "upcycle", "num_experts_per_tok": 1}, "at least 2"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED_SOURCES)
def test_sources_that_cannot_be_converted_are_refused_in_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        target_config(TINY | fields, ConvertSettings())
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("fields", "message"), REFUSED_SETTINGS)
def test_settings_that_do_not_fit_are_refused_in_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        target_config(TINY, ConvertSettings(**fields))
    assert "\n" not in str(refusal.value)


def test_neurons_without_a_divisor_name_those_there_are() -> None:
    with pytest.raises(ValueError, match="intermediate_size 86; use one of 1, 2, 43"):
        target_config({**TINY, "intermediate_size": 86}, ConvertSettings(experts="upcycle"))


@pytest.mark.parametrize(
    ("scaling", "message"), [({"rope_type": "dynamic"}, "dynamic"), ({"type": "linear"}, "factor")]
)
def test_exact_refuses_a_rope_that_it_cannot_copy(scaling: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        target_config({**TINY, "rope_scaling": scaling}, ConvertSettings(exact=True))

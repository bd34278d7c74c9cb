"""The config that a conversion writes: sizes, refusals, and what transformers makes of it."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DeepseekV3Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, SmolLM3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from smolseek.config import ConvertSettings
from smolseek.conversion.target import (
    CACHE_SHARE,
    cache_sizes,
    distill_steps,
    inverse_frequencies,
    padded_width,
    read_source,
    target_config,
)
from tests.configs import SMOLLM2_135M, TINY


def test_fields_match_transformers_after_a_round_trip() -> None:
    written = target_config(TINY, ConvertSettings(experts="upcycle"))
    read = DeepseekV3Config.from_dict(written).to_dict()
    differing = {
        k: (v, read.get(k)) for k, v in written.items() if k not in ("rope_theta", "torch_dtype") and read.get(k) != v
    }
    assert differing == {}
    assert read["rope_parameters"] == {"rope_type": "default", "rope_theta": 5000.0}


@pytest.mark.parametrize(
    ("kind", "config_class"),
    [
        ("llama", LlamaConfig),
        ("mistral", MistralConfig),
        ("smollm3", SmolLM3Config),
        ("qwen2", Qwen2Config),
        ("qwen3", Qwen3Config),
    ],
)
def test_fields_left_out_are_those_of_transformers(kind: str, config_class: type) -> None:
    required = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    given_fields = {name: TINY[name] for name in required} | {"num_attention_heads": 32, "sliding_window": None}
    source = read_source(given_fields | {"model_type": kind})
    stock = config_class(**given_fields).to_dict()
    shared = sorted((set(source) & set(stock)) - {"dtype", "rope"})
    assert {name: source[name] for name in shared} == {name: stock[name] for name in shared}
    assert source["rope"] == stock["rope_parameters"]
    assert list(source["rope_layers"]) == [bool(flag) for flag in stock.get("no_rope_layers", [1, 1])]


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
    assert rope_dim % 2 == 0 and head_dim % rope_dim == 0 and rope_dim <= max(2, CACHE_SHARE * numbers / 2)
    assert rank % (8 if CACHE_SHARE * numbers >= 64 else 4) == 0 or rank == hidden
    assert 8 <= rank <= min(hidden, numbers)
    if 8 < rank < hidden:
        assert abs(rank + rope_dim - CACHE_SHARE * numbers) <= 4


def test_a_share_of_the_cache_picks_the_sizes() -> None:
    """6 heads / 2 KV of 32, 8 / 4 of 8 and 9 / 3 of 32."""
    first, second, third = (
        read_source(TINY | {"num_attention_heads": h, "num_key_value_heads": g, "head_dim": d, "hidden_size": 192})
        for h, g, d in ((6, 2, 32), (8, 4, 8), (9, 3, 32))
    )
    shares = (0.75, 0.5, 0.375, 0.25)
    assert [cache_sizes(first, share, "portable") for share in shares] == [(64, 32), (32, 32), (32, 16), (16, 16)]
    assert [cache_sizes(second, share, "portable") for share in shares] == [(40, 8), (24, 8), (16, 8), (8, 8)]
    assert [cache_sizes(third, share, "portable") for share in shares] == [(112, 32), (64, 32), (40, 32), (32, 16)]


@given(share=st.floats(0.2, 1.0), head_dim=st.sampled_from([16, 24, 64, 80, 96]), kv_heads=st.integers(2, 8))
def test_the_cache_is_the_share_asked_for(share: float, head_dim: int, kv_heads: int) -> None:
    heads = {"num_attention_heads": kv_heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}
    config = target_config(TINY | heads | {"hidden_size": 4096}, ConvertSettings(cache=share))
    kept = config["kv_lora_rank"] + config["qk_rope_head_dim"]
    assert abs(kept - share * 2 * kv_heads * head_dim) <= 4


def test_a_cache_share_and_a_rope_width_leave_the_rank() -> None:
    config = target_config(SMOLLM2_135M, ConvertSettings(cache=0.5, qk_rope_head_dim=16))
    assert (config["kv_lora_rank"], config["qk_rope_head_dim"]) == (176, 16)


@pytest.mark.parametrize(
    ("head_dim", "heads"), [(32, (64, 64, 128)), (64, (64, 64, 128)), (80, (128, 64, 128)), (160, (192, 64, 256))]
)
def test_profile_vllm_takes_its_head_sizes_and_an_untied_head(head_dim: int, heads: tuple[int, ...]) -> None:
    source = TINY | {"head_dim": head_dim, "hidden_size": 640}
    config = target_config(source, ConvertSettings(profile="vllm"))
    assert tuple(config[f] for f in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")) == heads
    assert config["tie_word_embeddings"] is False
    wide = target_config(source, ConvertSettings(profile="vllm", qk_nope_head_dim=192, v_head_dim=256))
    assert (wide["qk_nope_head_dim"], wide["v_head_dim"]) == (192, 256)


def test_smollm3_s_exact_form_has_room_for_unrotated_keys() -> None:
    config = target_config(TINY | {"model_type": "smollm3", "no_rope_layers": [1, 0]}, ConvertSettings(exact=True))
    sizes = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "q_lora_rank")
    assert [config[name] for name in sizes] == [65, 32, 16, 16, None]


def test_qwen2_s_biases_take_a_query_latent_where_the_profile_has_biases() -> None:
    source = TINY | {"model_type": "qwen2"}
    exact, transformers, portable = (
        target_config(source, settings)
        for settings in (ConvertSettings(exact=True), ConvertSettings(profile="transformers"), ConvertSettings())
    )
    assert [c["q_lora_rank"] for c in (exact, transformers, portable)] == [65, 65, None]
    assert [c["attention_bias"] for c in (exact, transformers, portable)] == [True, True, False]


def test_qwen3_s_norms_have_no_exact_form() -> None:
    source = TINY | {"model_type": "qwen3", "sliding_window": 4096}
    assert read_source(source)["qk_norms"] and not read_source(TINY)["qk_norms"]
    assert not target_config(source, ConvertSettings())["attention_bias"]
    with pytest.raises(ValueError, match=r"exact: norms on every head.*no field of DeepSeek-V3.*leave out exact"):
        target_config(source, ConvertSettings(exact=True))


def test_smollm2_sizes() -> None:
    config = target_config(SMOLLM2_135M, ConvertSettings())
    wanted = {"qk_rope_head_dim": 64, "kv_lora_rank": 88, "qk_nope_head_dim": 64, "v_head_dim": 64}
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
    [(96, (4, 16, 4, 16, 4, 4.0)), (172, (2, 8, 2, 48, 4, 2.0))],
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
    assert 96 % (config["n_shared_experts"] + per_token) == 0
    assert config["moe_intermediate_size"] == padded_width(96 // (config["n_shared_experts"] + per_token))
    assert config["n_routed_experts"] == config["n_group"] * per_token and per_token >= 2
    for name, value in (
        ("n_shared_experts", shared),
        ("num_experts_per_tok", chosen),
        ("moe_intermediate_size", width and padded_width(width)),
    ):
        assert value is None or config[name] == value


@pytest.mark.parametrize(
    ("neurons", "fields", "expected"),
    [
        (1536, {}, (8, 24, 16, 48)),
        (1536, {"active": 0.5}, (8, 24, 8, 48)),
        (768, {"active": 0.375}, (8, 24, 4, 24)),
        (172, {}, (6, 16, 10, 8)),
        (768, {"n_routed_experts": 12}, (4, 12, 8, 48)),
        (768, {"n_shared_experts": 0}, (0, 32, 24, 24)),
        (768, {"moe_intermediate_size": 24, "num_experts_per_tok": 5}, (8, 24, 5, 24)),
        (96, {"n_shared_experts": 1, "n_routed_experts": 5}, (1, 5, 3, 16)),
    ],
)
def test_carved_sizes(neurons: int, fields: dict[str, Any], expected: tuple[int, ...]) -> None:
    config = target_config({**TINY, "intermediate_size": neurons}, ConvertSettings(experts="carve", **fields))
    names = ("n_shared_experts", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")
    assert tuple(config[name] for name in names) == expected
    assert (config["n_group"], config["topk_group"], config["norm_topk_prob"]) == (1, 1, True)
    assert config["routed_scaling_factor"] == expected[2]


@given(
    neurons=st.integers(16, 3000),
    shared=st.none() | st.integers(0, 8),
    routed=st.none() | st.integers(0, 40),
    chosen=st.none() | st.integers(0, 20),
    width=st.none() | st.integers(1, 100),
    active=st.none() | st.floats(-0.1, 1.1),
)
def test_carved_experts_are_the_dense_neurons_or_are_refused(
    neurons: int, shared: int | None, routed: int | None, chosen: int | None, width: int | None, active: float | None
) -> None:
    settings = ConvertSettings(
        experts="carve",
        active=active,
        n_shared_experts=shared,
        n_routed_experts=routed,
        num_experts_per_tok=chosen,
        moe_intermediate_size=width,
    )
    try:
        config = target_config({**TINY, "intermediate_size": neurons}, settings)
    except ValueError as error:
        assert "\n" not in str(error)
        return
    shared, routed = config["n_shared_experts"], config["n_routed_experts"]
    assert 1 <= config["num_experts_per_tok"] <= routed >= 2
    assert config["moe_intermediate_size"] % 8 == 0
    assert (shared + routed) * config["moe_intermediate_size"] >= neurons
    if active is not None:
        met = (shared + config["num_experts_per_tok"]) / (shared + routed)
        assert abs(met - active) <= 0.5 / (shared + routed) + 1e-9


@pytest.mark.parametrize("experts", ["upcycle", "carve"])
def test_first_layers_stay_dense(experts: Any) -> None:
    config = target_config(TINY, ConvertSettings(experts=experts, first_k_dense_replace=1))
    assert config["first_k_dense_replace"] == 1


@pytest.mark.parametrize("kind", ["linear", "llama3"])
@pytest.mark.parametrize("rope_dim", [4, 8, 16])
def test_profile_transformers_keeps_the_rope_type_at_every_stride(kind: str, rope_dim: int) -> None:
    """Slot j turns like source frequency stride * j, scaled as there."""
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    source = {k: v for k, v in TINY.items() if k != "rope_theta"}
    source["rope_parameters"] = {"rope_type": kind, "rope_theta": 5000.0, **scaling}
    stride = 16 // rope_dim
    settings = ConvertSettings(profile="transformers", qk_rope_head_dim=rope_dim)
    config = target_config(source, settings, rope_theta=5000.0 ** (stride * rope_dim / 16))
    latent = DeepseekV3RotaryEmbedding(DeepseekV3Config.from_dict(config))
    wanted = torch.tensor(inverse_frequencies(read_source(source)["rope"], 16))[::stride]
    torch.testing.assert_close(latent.inv_freq, wanted, rtol=1e-5, atol=0)


def test_llama3_is_plain_rope_in_the_portable_profile() -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    config = target_config(TINY | {"rope_scaling": {"rope_type": "llama3", **scaling}}, ConvertSettings())
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 5000.0}


REFUSED_SOURCES: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "gpt2"}, "gpt2.*llama, mistral"),
    ({"model_type": "qwen3_moe"}, "qwen3_moe.*experts already"),
    ({"model_type": "qwen3", "use_sliding_window": True}, "sliding_window 4096"),
    ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 32}, "sliding_window 32"),
    ({"model_type": "smollm3", "no_rope_layers": [1]}, "no_rope_layers has 1"),
    ({"hidden_size": None}, "hidden_size None"),
    ({"vocab_size": "many"}, "vocab_size 'many'"),
    ({"num_key_value_heads": 3}, "3 KV heads"),
    ({"head_dim": 15}, "head_dim 15"),
    ({"mlp_bias": True}, "mlp_bias True"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"model_type": "mistral", "sliding_window": 4096}, "sliding_window 4096"),
    ({"model_type": "mistral"}, "sliding_window 4096"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "linear.*--exact"),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
    ({"intermediate_size": 0}, "intermediate_size 0"),
]
REFUSED_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"qk_rope_head_dim": 3}, "qk_rope_head_dim 3.*even"),
    ({"qk_nope_head_dim": 0}, "qk_nope_head_dim 0"),
    ({"v_head_dim": -1}, "v_head_dim -1"),
    ({"q_lora_rank": 65}, "q_lora_rank 65.*1 to 64"),
    ({"q_lora_rank": 0}, "q_lora_rank 0"),
    ({"cache": 0.0}, "cache 0.0"),
    ({"cache": 1.5}, "cache 1.5"),
    ({"cache": 0.04}, "cache 0.04.*leave no latent; use 0."),
    ({"cache": 0.5, "kv_lora_rank": 8}, "cache 0.5.*kv_lora_rank"),
    ({"profile": "vllm", "v_head_dim": 64}, "vLLM takes"),
    ({"profile": "vllm", "qk_rope_head_dim": 8}, "vLLM takes"),
    ({"profile": "vllm", "cache": 0.5}, "leave no latent"),
    ({"profile": "vllm", "exact": True}, "exact.*vLLM"),
    ({"exact": True, "q_lora_rank": 8}, "exact.*q_lora_rank"),
    ({"exact": True, "cache": 0.5}, "exact.*cache"),
    ({"first_k_dense_replace": 1}, "first_k_dense_replace 1.*upcycle"),
    ({"experts": "carve", "first_k_dense_replace": 2}, "first_k_dense_replace 2.*0 to 1"),
    ({"experts": "upcycle", "first_k_dense_replace": -1}, "first_k_dense_replace -1"),
    ({"active": 0.5}, "active 0.5.*carve"),
    ({"experts": "carve", "active": 0.1}, "active 0.1.*use 0."),
    ({"experts": "carve", "active": 2.0}, "active 2.0"),
    ({"experts": "carve", "active": 0.5, "num_experts_per_tok": 2}, "num_experts_per_tok"),
    ({"experts": "carve", "num_experts_per_tok": 13}, "num_experts_per_tok 13.*1 to 9"),
    ({"experts": "carve", "n_shared_experts": 1, "n_routed_experts": 4, "moe_intermediate_size": 9}, "be 11"),
    ({"experts": "carve", "moe_intermediate_size": 49}, "use 1 to 48"),
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


@pytest.mark.parametrize(
    ("layers", "fields", "steps"),
    [
        (2, {}, 600),
        (400, {}, 172),
        (2000, {}, 0),
        (2, {"refine_steps": 0}, 0),
        (2000, {"distill_steps": 7}, 7),
        (2, {"refine_steps": 0, "distill_steps": 7}, 7),
    ],
)
def test_steps_of_the_end_to_end_stage_follow_from_the_size(layers: int, fields: dict[str, Any], steps: int) -> None:
    assert distill_steps(TINY | {"num_hidden_layers": layers}, ConvertSettings(**fields)) == steps


@pytest.mark.parametrize("field", ["refine_steps", "distill_steps"])
def test_negative_steps_are_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} -1: must be 0 or more"):
        distill_steps(TINY, ConvertSettings(**{field: -1}))

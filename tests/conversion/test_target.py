"""The config.json that a conversion writes: what transformers makes of it, the exact form, rope types, refusals."""

from typing import Any

import pytest
import torch
from transformers import DeepseekV3Config, LlamaConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from smolseek.config import ConvertSettings
from smolseek.conversion.target import target_config
from smolseek.formats.dense import read_source
from smolseek.formats.rope import inverse_frequencies
from tests.configs import TINY

WIDE = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}


def test_fields_match_transformers_after_a_round_trip() -> None:
    written = target_config(read_source(TINY), ConvertSettings(experts="upcycle"))
    read = DeepseekV3Config.from_dict(written).to_dict()
    differing = {
        k: (v, read.get(k)) for k, v in written.items() if k not in ("rope_theta", "torch_dtype") and read.get(k) != v
    }
    assert differing == {}
    assert read["rope_parameters"] == {"rope_type": "default", "rope_theta": 5000.0}


def test_given_sizes_and_theta_are_kept() -> None:
    config = target_config(read_source(TINY), ConvertSettings(kv_lora_rank=64, qk_rope_head_dim=16), rope_theta=77.0)
    assert (config["kv_lora_rank"], config["qk_rope_head_dim"]) == (64, 16)
    assert config["rope_parameters"]["rope_theta"] == config["rope_theta"] == 77.0


def test_smollm3_s_exact_form_has_room_for_unrotated_keys() -> None:
    config = target_config(
        read_source(TINY | {"model_type": "smollm3", "no_rope_layers": [1, 0], "pad_token_id": None}),
        ConvertSettings(exact=True),
    )
    sizes = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "q_lora_rank")
    assert [config[name] for name in sizes] == [65, 32, 16, 16, None]


def test_qwen2_s_biases_take_a_query_latent_where_the_profile_has_biases() -> None:
    source = TINY | {"model_type": "qwen2"}
    exact, transformers, portable = (
        target_config(read_source(source), settings)
        for settings in (ConvertSettings(exact=True), ConvertSettings(profile="transformers"), ConvertSettings())
    )
    assert [c["q_lora_rank"] for c in (exact, transformers, portable)] == [65, 65, None]
    assert [c["attention_bias"] for c in (exact, transformers, portable)] == [True, True, False]


def test_qwen3_s_norms_have_no_exact_form() -> None:
    source = TINY | {"model_type": "qwen3", "sliding_window": 4096}
    assert read_source(source).qk_norms and not read_source(TINY).qk_norms
    assert not target_config(read_source(source), ConvertSettings())["attention_bias"]
    with pytest.raises(ValueError, match=r"exact: norms on every head.*no field of DeepSeek-V3.*leave out exact"):
        target_config(read_source(source), ConvertSettings(exact=True))


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
    written = target_config(read_source(source | {"model_type": "llama"}), ConvertSettings(exact=True))
    assert (written["qk_rope_head_dim"], written["kv_lora_rank"], written["attention_bias"]) == (32, 33, True)
    dense = LlamaRotaryEmbedding(LlamaConfig(**source))
    latent = DeepseekV3RotaryEmbedding(DeepseekV3Config.from_dict(written))
    torch.testing.assert_close(latent.inv_freq, dense.inv_freq.repeat(2), rtol=5e-7, atol=0)
    assert latent.attention_scaling == 1.0


@pytest.mark.parametrize("kind", ["linear", "llama3"])
@pytest.mark.parametrize("rope_dim", [4, 8, 16])
def test_profile_transformers_keeps_the_rope_type_at_every_stride(kind: str, rope_dim: int) -> None:
    """Slot j turns like source frequency stride * j, with the source's scaling."""
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    source = {k: v for k, v in TINY.items() if k != "rope_theta"}
    source["rope_parameters"] = {"rope_type": kind, "rope_theta": 5000.0, **scaling}
    stride = 16 // rope_dim
    settings = ConvertSettings(profile="transformers", qk_rope_head_dim=rope_dim)
    config = target_config(read_source(source), settings, rope_theta=5000.0 ** (stride * rope_dim / 16))
    latent = DeepseekV3RotaryEmbedding(DeepseekV3Config.from_dict(config))
    wanted = torch.tensor(inverse_frequencies(read_source(source).rope, 16))[::stride]
    torch.testing.assert_close(latent.inv_freq, wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("profile", ["portable", "vllm"])
def test_yarn_stands_in_for_llama3_where_a_profile_has_no_such_type(profile: Any) -> None:
    """Every slot but those of the ramp turns like its source frequency, and the scores keep their scale."""
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512}
    llama3 = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5000.0, **scaling}}
    source = {k: v for k, v in TINY.items() if k != "rope_theta"} | WIDE | {"max_position_embeddings": 4096} | llama3
    settings = ConvertSettings(profile=profile, qk_rope_head_dim=64, kv_lora_rank=256)
    config = target_config(read_source(source), settings)
    rope = config["rope_parameters"]
    assert rope["rope_type"] == "yarn" and rope["factor"] * rope["original_max_position_embeddings"] == 4096
    latent = DeepseekV3RotaryEmbedding(DeepseekV3Config.from_dict(config))
    wanted = torch.tensor(inverse_frequencies(read_source(source).rope, 64))
    apart = ((latent.inv_freq - wanted) / wanted).abs()
    assert latent.attention_scaling == 1.0 and (apart > 1e-5).sum() <= 6 and apart.max() < 0.5
    attention = DeepseekV3Attention(DeepseekV3Config.from_dict(config), 0)
    assert attention.scaling == pytest.approx(attention.qk_head_dim**-0.5, rel=1e-5)


def test_a_scaling_that_reaches_no_slot_leaves_the_plain_type() -> None:
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 10**6,
    }
    config = target_config(read_source(TINY | {"rope_scaling": {"rope_type": "llama3", **scaling}}), ConvertSettings())
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 5000.0}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"q_lora_rank": 65}, "q_lora_rank 65.*1 to 64"),
    ({"q_lora_rank": 0}, "q_lora_rank 0"),
    ({"profile": "vllm", "exact": True}, "exact.*vLLM"),
    ({"exact": True, "q_lora_rank": 8}, "exact.*q_lora_rank"),
    ({"exact": True, "cache": 0.5}, "exact.*cache"),
    ({"exact": True, "kv_lora_rank": 8}, "exact"),
    ({"exact": True, "qk_rope_head_dim": 8}, "exact"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_settings_that_do_not_fit_are_refused_in_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        target_config(read_source(TINY), ConvertSettings(**fields))
    assert "\n" not in str(refusal.value)


REFUSED_ROPES: list[tuple[dict[str, Any], str]] = [
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "linear.*--exact"),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED_ROPES)
def test_ropes_that_cannot_be_converted_are_refused_in_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        target_config(read_source(TINY | fields), ConvertSettings())
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("scaling", "message"), [({"rope_type": "dynamic"}, "dynamic"), ({"type": "linear"}, "factor")]
)
def test_exact_refuses_a_rope_that_it_cannot_copy(scaling: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        target_config(read_source({**TINY, "rope_scaling": scaling}), ConvertSettings(exact=True))

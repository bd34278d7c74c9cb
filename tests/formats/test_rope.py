"""Rotary parameters in old and new files, and the frequencies that they mean."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, DeepseekV3Config, LlamaConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from smolseek.formats.rope import inverse_frequencies, rope_parameters, target_frequencies
from tests.configs import TINY

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def test_old_and_new_rope_fields_say_the_same() -> None:
    old = {**TINY, "rope_scaling": {"type": "linear", "factor": 2.0}}
    new = {k: v for k, v in TINY.items() if k != "rope_theta"}
    new["rope_parameters"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
    assert rope_parameters(old) == rope_parameters(new)


@pytest.mark.parametrize("scaling", [{"rope_type": "default"}, {"rope_type": "linear", "factor": 4.0}, LLAMA3])
def test_frequencies_are_those_of_transformers(scaling: dict[str, Any]) -> None:
    rope = scaling | {"rope_theta": 5000.0}
    source = {k: v for k, v in TINY.items() if k not in ("rope_theta", "model_type")} | {"rope_parameters": rope}
    stock = LlamaRotaryEmbedding(LlamaConfig(**source))
    torch.testing.assert_close(torch.tensor(inverse_frequencies(rope, 16)), stock.inv_freq, rtol=5e-7, atol=0)


@pytest.mark.parametrize(("fast", "slow"), [(32.0, 1.0), (4.0, 1.0), (2.0, 2.0), (1e3, 1e-3)])
def test_yarn_s_frequencies_are_those_of_transformers(fast: float, slow: float) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 8.0, "original_max_position_embeddings": 64}
    rope |= {"beta_fast": fast, "beta_slow": slow}
    stock = DeepseekV3RotaryEmbedding(DeepseekV3Config(qk_rope_head_dim=16, rope_parameters=dict(rope)))
    torch.testing.assert_close(torch.tensor(target_frequencies(rope, 16)), stock.inv_freq, rtol=5e-7, atol=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_type 'dynamic': not supported"),
        ({"type": "linear"}, "rope_type linear: factor None: must be a number"),
        (LLAMA3 | {"low_freq_factor": "1"}, "rope_type llama3: low_freq_factor '1': must be a number"),
        ({"type": "linear", "factor": 0}, "factor 0: must be a number from"),
        ({"type": "linear", "factor": True}, "factor True: must be a number"),
        (LLAMA3 | {"low_freq_factor": 4.0}, "low_freq_factor 4.0: must be below high_freq_factor 4.0"),
        ({"type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5: only whole"),
    ],
)
def test_types_that_cannot_be_converted_are_refused_in_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        inverse_frequencies(rope_parameters({"rope_scaling": fields}), 16)
    assert "\n" not in str(refusal.value)


LINEAR = {"rope_type": "linear", "factor": 2.0}
PLAIN = {"rope_type": "default", "rope_theta": 123.0}
MIXED: list[dict[str, Any]] = [
    {"rope_parameters": PLAIN, "rope_scaling": LINEAR},
    {"rope_parameters": PLAIN, "rope_scaling": LINEAR, "rope_theta": 77.0},
    {"rope_parameters": PLAIN, "rope_scaling": LINEAR | {"rope_theta": 9.0}, "rope_theta": 77.0},
    {"rope_parameters": PLAIN, "rope_scaling": {}},
    {"rope_parameters": PLAIN, "rope_scaling": None, "rope_theta": 77.0},
    {"rope_parameters": PLAIN, "rope_theta": None},
    {"rope_parameters": {}, "rope_scaling": LINEAR},
    {"rope_parameters": None, "rope_theta": 77},
    {"rope_parameters": LINEAR, "rope_theta": 77.0},
    {"rope_parameters": {"rope_theta": 5.0}},
    {"rope_parameters": LLAMA3 | {"type": "yarn"}},
    {"rope_scaling": {"type": "linear", "factor": 2.0, "rope_theta": 77.0}, "rope_theta": 5.0},
    {"rope_scaling": {"factor": 2.0}},
]


@pytest.mark.parametrize("fields", MIXED)
def test_old_and_new_fields_together_mean_what_transformers_takes(fields: dict[str, Any]) -> None:
    config = {name: value for name, value in TINY.items() if name != "rope_theta"} | fields
    stock = AutoConfig.for_model(**config).rope_parameters
    assert rope_parameters(config) == {name: value for name, value in stock.items() if name != "type"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_parameters": [1]}, r"rope_parameters \[1\]: must be a mapping"),
        ({"rope_scaling": "linear"}, "rope_scaling 'linear': must be a mapping"),
        ({"rope_scaling": False}, "rope_scaling False: must be a mapping"),
        ({"rope_parameters": {"full_attention": PLAIN}}, "of its own for 'full_attention'"),
        ({"rope_parameters": {"rope_type": None}}, "rope_type None: must be a text"),
        ({"rope_parameters": {"rope_type": ["linear"]}}, r"rope_type \['linear'\]: must be a text"),
        ({"rope_parameters": {"rope_theta": None}}, "rope_theta None: must be a number"),
        *(
            ({"rope_theta": theta}, "rope_theta .*: must be a number")
            for theta in (None, "5", True, -1, 0, float("nan"), float("inf"), 10**400, {})
        ),
    ],
)
def test_broken_rotary_fields_are_refused_in_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        rope_parameters(TINY | fields)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 300

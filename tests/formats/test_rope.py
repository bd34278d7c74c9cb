"""Rotary parameters in old and new files, and the frequencies that they mean."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from smolseek.formats.rope import inverse_frequencies, rope_parameters
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


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_type 'dynamic': not supported"),
        ({"type": "linear"}, "rope_type linear: factor None is no number"),
        (LLAMA3 | {"low_freq_factor": "1"}, "rope_type llama3: low_freq_factor '1' is no number"),
    ],
)
def test_types_that_cannot_be_converted_are_refused_in_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        inverse_frequencies(rope_parameters({"rope_scaling": fields}), 16)
    assert "\n" not in str(refusal.value)

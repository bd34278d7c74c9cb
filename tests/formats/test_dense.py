"""Dense sources: fields left out, tensors, families, refusals."""

from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from smolseek.config import ConvertSettings
from smolseek.formats.dense import FAMILIES, Family, cache_numbers, read_source
from smolseek.machine import Machine
from smolseek.planning import plan
from tests.configs import TINY

FAMILY_FIELDS: list[dict[str, Any]] = [
    {},
    {"tie_word_embeddings": False},
    {"attention_bias": True},
    {"model_type": "mistral", "sliding_window": None},
    {"model_type": "smollm3", "no_rope_layers": [1, 0], "pad_token_id": None},
    {"model_type": "qwen2"},
    {"model_type": "qwen3"},
    {"model_type": "qwen3", "attention_bias": True},
]


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
    shared = sorted((set(vars(source)) & set(stock)) - {"dtype"})
    assert {name: getattr(source, name) for name in shared} == {name: stock[name] for name in shared}
    assert source.rope == stock["rope_parameters"]
    assert bool(source.biases) == stock.get("attention_bias", kind == "qwen2")
    assert list(source.rope_layers) == [bool(flag) for flag in stock.get("no_rope_layers", [1, 1])]


@pytest.mark.parametrize("fields", FAMILY_FIELDS)
def test_tensors_are_those_that_transformers_builds(fields: dict[str, Any]) -> None:
    config = TINY | fields
    with torch.device("meta"):
        stock = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    source = read_source(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in stock.named_parameters()}
    assert source.tensors() == shapes
    assert source.parameters() == sum(parameter.numel() for parameter in stock.parameters())


def test_a_source_s_cache_is_its_keys_and_values() -> None:
    assert read_source(TINY).cache_numbers == cache_numbers(TINY) == 2 * 2 * 16
    without_heads = {k: v for k, v in TINY.items() if k not in ("head_dim", "num_key_value_heads")}
    assert read_source(without_heads).cache_numbers == cache_numbers(without_heads) == 2 * 4 * 16


def test_a_new_row_is_all_that_a_family_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Family({"max_position_embeddings": 999}, rope_theta=123.0, biases="qk", qk_norms=True)
    with pytest.raises(ValueError, match="model_type 'invented': not supported"):
        read_source(TINY | {"model_type": "invented"})
    monkeypatch.setitem(FAMILIES, "invented", row)
    config = {k: v for k, v in TINY.items() if k not in ("rope_theta", "max_position_embeddings")}
    config["model_type"] = "invented"
    source = read_source(config)
    assert (source.max_position_embeddings, source.rope["rope_theta"], source.biases) == (999, 123.0, "qk")
    assert {name for name in source.layer_tensors() if name.startswith("self_attn.")} == {
        *(f"self_attn.{letter}_proj.weight" for letter in "qkvo"),
        *(f"self_attn.{letter}_{kind}" for letter in "qk" for kind in ("norm.weight", "proj.bias")),
    }
    machine = Machine(flops_per_second=1e11, bytes_per_second=1e10)
    assert plan(config, ConvertSettings(), machine).source.total_parameters == source.parameters()
    with pytest.raises(ValueError, match=r"gpt2.*convert one of .*invented"):
        read_source(TINY | {"model_type": "gpt2"})


REFUSED: list[tuple[dict[str, Any], str]] = [
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
    ({"intermediate_size": 0}, "intermediate_size 0"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_sources_that_cannot_be_converted_are_refused_in_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        read_source(TINY | fields)
    assert "\n" not in str(refusal.value)

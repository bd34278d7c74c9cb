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
    given_fields["vocab_size"] = 130_000  # SmolLM3's padding token is among them
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
    ({"model_type": "smollm3", "pad_token_id": None, "no_rope_layers": [1]}, "no_rope_layers has 1"),
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
    ({"model_type": "deepseek_v3"}, "is DeepSeek-V3 already, and needs no conversion: heal it with smolseek train"),
    ({"model_type": "smolseek_v3_softmax"}, "is DeepSeek-V3 already"),
    ({"model_type": ["llama"]}, r"model_type \['llama'\]: not supported"),
    ({"model_type": None}, "model_type None: not supported"),
    ({"quantization": {"bits": 4}}, "quantization {'bits': 4}: quantised"),
    ({"model_type": "mistral", "sliding_window": 0}, "sliding_window 0: MLA"),
    ({"layer_types": ["sliding_attention"] * 2}, "layer_types .*: must be full_attention for each of the 2"),
    ({"layer_types": ["full_attention"]}, "layer_types"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5: must be 1"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000: must be an integer from 1 to 10,000"),
    ({"head_dim": 2**30}, "head_dim 1073741824: must be an integer from 1 to 4,096, or null"),
    ({"hidden_size": 2**62}, "hidden_size"),
    ({"hidden_size": 3, "head_dim": None}, "head_dim 0"),
    ({"pad_token_id": 50}, "pad_token_id 50: must be below vocab_size 50, or null"),
    ({"pad_token_id": -51}, "pad_token_id -51"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps nan: must be a decimal number"),
    ({"rms_norm_eps": -1.0}, "rms_norm_eps -1.0"),
    ({"dtype": "auto"}, "dtype 'auto': must be one of float32, float16, bfloat16, float64"),
    ({"dtype": None, "torch_dtype": "int8"}, "dtype 'int8'"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "'LlamaForSequenceClassification': no language model"),
    ({"architectures": ["LlamaForTokenClassification"]}, "gives labels or scores; name a checkpoint of a ...ForCausal"),
    ({"architectures": "LlamaForQuestionAnswering"}, "'LlamaForQuestionAnswering'"),
    ({"architectures": ["Qwen2ForProcessRewardModel"]}, "'Qwen2ForProcessRewardModel'"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_sources_that_cannot_be_converted_are_refused_in_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        read_source(TINY | fields)
    assert "\n" not in str(refusal.value)


NAN = float("nan")
BROKEN: dict[str, list[Any]] = {
    "dtype": ["auto", "bogus", 7, "torch.bfloat16", "int8", ["a"], "nn", ""],
    "eos_token_id": ["2", [4, "5"], True, 2.0, [[1]]],
    "bos_token_id": ["2", [1], 2.0],
    "pad_token_id": [50, 99, "1", 1.0, True, [1], -51],
    "max_position_embeddings": [512.0, None, "512", True, NAN],
    "vocab_size": [50.0, None, "50", -1, True, NAN, 10**30],
    "hidden_size": [64.0, None, -1, True, NAN, 10**30],
    "intermediate_size": [96.0, None, True, 10**30],
    "num_hidden_layers": [2.0, None, True],
    "num_attention_heads": [4.0, None, True, 0],
    "num_key_value_heads": [2.0, True, 0, -2, "2", NAN],
    "head_dim": [16.0, True, 0, -2, "16", NAN, 15],
    "rms_norm_eps": [None, "x", -1, 0, True, 1],
    "initializer_range": [None, "x", NAN, -1, True, float("inf"), 10],
    "hidden_act": [None, "SiLU", 7, ["a"], ""],
    "tie_word_embeddings": [None, "true", 1, "", [1]],
    "attention_bias": [None, "yes", 1],
    "mlp_bias": [None, "yes", 1],
    "quantization_config": [[], "x", 0],
    "model_type": [None, 7, ["llama"], {}, "Llama"],
    "layer_types": [["full_attention"], ["x"]],
    "rope_parameters": [[1], "x"],
    "rope_theta": [None, "5", {}, 10**400],
}


@pytest.mark.parametrize("field", BROKEN)
def test_what_transformers_refuses_is_refused_in_one_line(field: str) -> None:
    for value in BROKEN[field]:
        config = TINY | {field: value}
        with pytest.raises(Exception), torch.device("meta"):  # noqa: B017 - it raises whatever its code meets
            AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
        with pytest.raises(ValueError) as refusal:
            read_source(config)
        assert "\n" not in str(refusal.value) and field in str(refusal.value)


def test_values_that_mean_the_same_are_taken() -> None:
    plain = read_source(TINY)
    assert read_source(TINY | {"hidden_act": "swish", "pad_token_id": -1}).hidden_act == "silu"
    assert read_source(TINY | {"layer_types": ["full_attention"] * 2, "partial_rotary_factor": 1.0}) == plain
    assert read_source(TINY | {"dtype": None, "torch_dtype": "bfloat16"}) == plain
    assert read_source(TINY | {"torch_dtype": "float16"}) == plain
    for named in (None, [], ["LlamaForCausalLM"], ["LlamaModel"], "LlamaForCausalLM", [7]):
        assert read_source(TINY | {"architectures": named}) == plain
    qwen = TINY | {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 4096}
    assert read_source(qwen).biases == "qkv"

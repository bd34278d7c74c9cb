"""Dense Llama-family checkpoints: their config.json and their tensors. One row per family in `FAMILIES`.

To add a family, add its row here and its tests in tests/formats/test_dense.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from smolseek.formats.deepseek_v3 import SOFTMAX_MODEL_TYPE
from smolseek.formats.fields import (
    FLAG,
    LAYERS,
    SIZE,
    TOKEN_ID,
    Rule,
    check_architectures,
    check_fields,
    decimal,
    shown,
    whole_number,
)
from smolseek.formats.rope import rope_parameters

_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
"""Fields that every config.json must give."""
DTYPES = ("float32", "float16", "bfloat16", "float64")
"""Dtypes that weights may have, by torch's names."""
_HEADS = whole_number(1, 4096)
_LLAMA_DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "sliding_window": None,
    "use_sliding_window": False,
    "layer_types": None,
    "no_rope_layers": None,
    "no_rope_layer_interval": 4,
    "partial_rotary_factor": None,
    "quantization_config": None,
    "quantization": None,
}
_IDS = Rule(lambda ids: isinstance(ids, list) and all(type(i) is int for i in ids), "a list of integers")
_RULES: dict[str, Rule] = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size", "max_position_embeddings"), SIZE),
    "num_hidden_layers": LAYERS,
    "num_attention_heads": _HEADS,
    "num_key_value_heads": _HEADS.or_null(),
    "head_dim": _HEADS.or_null(),
    "initializer_range": decimal(0, 1),
    "rms_norm_eps": decimal(0, 1),
    "pad_token_id": TOKEN_ID,
    "bos_token_id": TOKEN_ID,
    "eos_token_id": Rule(lambda ids: TOKEN_ID.holds(ids) or _IDS.holds(ids), "an integer, a list of them, or null"),
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "use_sliding_window"), FLAG),
    "no_rope_layers": _IDS.or_null(),
    "no_rope_layer_interval": SIZE,
    "partial_rotary_factor": Rule(lambda factor: factor in (None, 1), "1, as only whole heads are converted"),
    "dtype": Rule(lambda dtype: dtype in DTYPES, f"one of {', '.join(DTYPES)}"),
}
"""What the fields may hold, once those that the file leaves out are filled in."""


@dataclass(frozen=True)
class Family:
    """How one dense architecture differs from Llama."""

    defaults: Mapping[str, Any]
    """transformers' values for fields that config.json leaves out, where they are not Llama's."""
    rope_theta: float = 10_000.0
    """transformers' value where config.json leaves it out."""
    biases: str | None = None
    """Letters of the attention projections q, k, v and o that have a bias; none: all if `attention_bias` is set."""
    qk_norms: bool = False
    """Whether an RMSNorm stands behind every head's query and key, before the rotation."""
    skips_rope: bool = False
    """Whether `no_rope_layers` names layers that do not rotate (SmolLM3)."""
    window_is_optional: bool = False
    """Whether `sliding_window` counts only when `use_sliding_window` is set."""


_QWEN2_DEFAULTS = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "bos_token_id": None,
    "eos_token_id": None,
    "sliding_window": 4096,
}
_SMOLLM3_DEFAULTS = {
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "pad_token_id": 128004,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "tie_word_embeddings": True,
}
_MISTRAL_DEFAULTS = {"num_key_value_heads": 8, "max_position_embeddings": 4096 * 32, "sliding_window": 4096}

FAMILIES: dict[str, Family] = {
    "llama": Family({}),
    "mistral": Family(_MISTRAL_DEFAULTS, biases=""),
    "smollm3": Family(_SMOLLM3_DEFAULTS, rope_theta=2_000_000.0, skips_rope=True, window_is_optional=True),
    "qwen2": Family(_QWEN2_DEFAULTS, biases="qkv", window_is_optional=True),
    "qwen3": Family(_QWEN2_DEFAULTS | {"head_dim": 128}, qk_norms=True, window_is_optional=True),
}
"""The families that can be converted, by `model_type`."""

_IS_V3 = "it is DeepSeek-V3 already, and needs no conversion: heal it with smolseek train, as the source of a recipe"
REFUSED_TYPES = {
    "qwen3_moe": "its MLPs are experts already, and only dense ones are converted",
    "deepseek_v3": _IS_V3,
    SOFTMAX_MODEL_TYPE: _IS_V3,
}
"""Architectures that look like a family and are none, and why."""

_QUANTISED = "quantised weights are not converted; name the checkpoint it was made from"
REFUSED_VALUES: tuple[tuple[str, Any, str], ...] = (
    ("quantization_config", None, _QUANTISED),
    ("quantization", None, _QUANTISED),
    ("sliding_window", None, "MLA attends to the whole prefix; name a checkpoint without a window"),
    ("mlp_bias", False, "stock DeepSeek-V3 has no bias in its MLP; name a model without it"),
    ("hidden_act", "silu", "stock DeepSeek-V3 is SwiGLU; name a model with it"),
)
"""Fields, the only value that converts, and why no other one does."""


@dataclass(frozen=True)
class DenseSource:
    """A dense model as its config.json describes it, fields that the file leaves out filled in as transformers does."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    hidden_act: str
    initializer_range: float
    rms_norm_eps: float
    pad_token_id: int | None
    bos_token_id: Any
    eos_token_id: Any
    tie_word_embeddings: bool
    dtype: str
    rope: Mapping[str, Any]
    """`rope_type`, `rope_theta` and the type's own parameters."""
    rope_layers: tuple[bool, ...]
    """Which layers rotate queries and keys."""
    biases: str
    """Letters of the attention projections q, k, v and o that have a bias."""
    qk_norms: bool
    """Whether every head's query and key pass an RMSNorm."""

    @property
    def key_channels(self) -> int:
        """k: numbers in all keys of a token, and in all its values."""
        return self.num_key_value_heads * self.head_dim

    @property
    def cache_numbers(self) -> int:
        """Y: numbers that a token leaves in one layer's cache, its keys and its values."""
        return 2 * self.key_channels

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Returns name and shape of every tensor of the checkpoint."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, self.hidden_size)}
        layer = self.layer_tensors()
        for index in range(self.num_hidden_layers):
            shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
        shapes["model.norm.weight"] = (self.hidden_size,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden_size)
        return shapes

    def layer_tensors(self) -> dict[str, tuple[int, ...]]:
        """Returns name, under the layer's, and shape of every tensor of one layer."""
        hidden, neurons, key = self.hidden_size, self.intermediate_size, self.key_channels
        query = self.num_attention_heads * self.head_dim
        projections = {"q": (query, hidden), "k": (key, hidden), "v": (key, hidden), "o": (hidden, query)}
        shapes: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (hidden,)}
        shapes |= {f"self_attn.{letter}_proj.weight": shape for letter, shape in projections.items()}
        if self.qk_norms:
            shapes |= {f"self_attn.{letter}_norm.weight": (self.head_dim,) for letter in "qk"}
        shapes |= {f"self_attn.{letter}_proj.bias": projections[letter][:1] for letter in self.biases}
        shapes["post_attention_layernorm.weight"] = (hidden,)
        shapes |= {f"mlp.{name}_proj.weight": (neurons, hidden) for name in ("gate", "up")}
        return shapes | {"mlp.down_proj.weight": (hidden, neurons)}

    def parameters(self) -> int:
        """Returns the number of parameters."""
        return sum(math.prod(shape) for shape in self.tensors().values())


def read_source(config: Mapping[str, Any]) -> DenseSource:
    """Returns the dense model that a config.json describes.

    Raises:
        ValueError: the architecture is not supported or no language model, a size is missing, or the sizes do not fit
            each other.
    """
    kind = config.get("model_type")
    family = _family(kind)
    check_architectures(config)
    fields = {field: config.get(field, default) for field, default in (_LLAMA_DEFAULTS | dict(family.defaults)).items()}
    dtype = named_dtype(config)
    fields |= {field: config.get(field) for field in _SIZES} | {"dtype": "float32" if dtype is None else dtype}
    if family.window_is_optional and fields["use_sliding_window"] is False:
        fields["sliding_window"] = None  # a width is written whether or not it is used
    if fields["hidden_act"] == "swish":  # another name of it
        fields["hidden_act"] = "silu"
    for field, wanted, why in REFUSED_VALUES:
        if fields[field] != wanted:
            raise ValueError(f"config.json: {field} {shown(fields[field])}: {why}")
    check_fields(fields, _RULES)
    _check_padding(fields)
    _check_layer_types(fields)
    heads = fields["num_attention_heads"]
    fields["num_key_value_heads"] = fields["num_key_value_heads"] or heads
    fields["head_dim"] = fields["head_dim"] or fields["hidden_size"] // heads
    if heads % fields["num_key_value_heads"] or fields["head_dim"] % 2 or not fields["head_dim"]:
        raise ValueError(
            f"config.json: {heads} heads, {fields['num_key_value_heads']} KV heads, head_dim {fields['head_dim']}: "
            "KV heads must divide the heads and head_dim must be even; fetch the file again"
        )
    return DenseSource(
        model_type=str(kind),
        **{field.name: fields[field.name] for field in dataclasses.fields(DenseSource) if field.name in fields},
        rope=rope_parameters(config, family.rope_theta),
        rope_layers=_rope_layers(fields, family),
        biases=("qkvo" if fields["attention_bias"] else "") if family.biases is None else family.biases,
        qk_norms=family.qk_norms,
    )


def cache_numbers(config: Mapping[str, Any]) -> int:
    """Returns the numbers that a token leaves in one layer's cache of any model with grouped queries."""
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    return 2 * (config.get("num_key_value_heads") or heads) * head_dim


def named_dtype(config: Mapping[str, Any]) -> Any:
    """Returns the dtype that a config.json names under its new or its old name, or None."""
    return next((config[field] for field in ("dtype", "torch_dtype") if config.get(field) is not None), None)


def _family(kind: Any) -> Family:
    """Returns the row of a model type, or refuses it."""
    supported = f"convert one of {', '.join(FAMILIES)}"
    if not isinstance(kind, str) or kind not in FAMILIES:
        why = f"{REFUSED_TYPES[kind]}; " if isinstance(kind, str) and kind in REFUSED_TYPES else ""
        raise ValueError(f"model_type {shown(kind)}: not supported; {why}{supported}")
    return FAMILIES[kind]


def _check_padding(fields: Mapping[str, Any]) -> None:
    """Raises ValueError if the padding token has no row among the embeddings; they count from the end below 0."""
    padding, vocabulary = fields["pad_token_id"], fields["vocab_size"]
    if padding is not None and not -vocabulary <= padding < vocabulary:
        raise ValueError(
            f"config.json: pad_token_id {padding}: must be below vocab_size {vocabulary}, or null; change it there"
        )


def _check_layer_types(fields: Mapping[str, Any]) -> None:
    """Raises ValueError unless every layer attends to the whole prefix."""
    kinds, layers = fields["layer_types"], fields["num_hidden_layers"]
    if kinds is not None and kinds != ["full_attention"] * layers:
        raise ValueError(
            f"config.json: layer_types {shown(kinds)}: must be full_attention for each of the {layers} layers; MLA "
            "attends to the whole prefix, so name another model"
        )


def _rope_layers(fields: Mapping[str, Any], family: Family) -> tuple[bool, ...]:
    """Returns for each layer whether it rotates; SmolLM3 writes 1 for the layers that do."""
    layers, rotates, interval = (fields[f] for f in ("num_hidden_layers", "no_rope_layers", "no_rope_layer_interval"))
    if not family.skips_rope:
        return (True,) * layers
    rotates = [(i + 1) % interval != 0 for i in range(layers)] if rotates is None else rotates
    if len(rotates) < layers:
        raise ValueError(
            f"config.json: no_rope_layers has {len(rotates)} entries for {layers} layers; fetch the file again"
        )
    return tuple(bool(flag) for flag in rotates[:layers])

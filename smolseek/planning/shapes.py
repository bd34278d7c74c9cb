"""The sizes of dense and converted models that their time and memory follow from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from smolseek.config import ConvertSettings
from smolseek.conversion.sizes import is_small
from smolseek.formats import deepseek_v3, dense
from smolseek.formats.dense import DenseSource

CACHE_NUMBER_BYTES = 2
"""bf16, in which caches are counted."""


@dataclass(frozen=True)
class ModelSize:
    """Parameters (`active`: those that one token meets) and cache of a model; bytes are bf16."""

    total_parameters: int
    active_parameters: int
    cache_numbers_per_token_and_layer: int
    cache_bytes_per_token: int
    cache_bytes_at_max_context: int


@dataclass(frozen=True)
class Shape:
    """The sizes of a dense or a converted model that its time and memory follow from."""

    hidden: int
    layers: int
    heads: int
    neurons: int
    total: int
    """Parameters."""
    active: int
    """Parameters that one token meets."""
    weights: int
    """Parameters that a token is multiplied with: not an embedding table, of which it reads one row."""
    attention: int
    """Parameters of one attention block."""
    cache_numbers: int
    """Numbers that a token leaves in one layer's cache."""
    decode_flops: int
    """Flops of a new token for each cached position and layer."""
    vocabulary: int
    context: int
    tables: int
    """Parameters outside the layers, embeddings and head."""

    @property
    def stored(self) -> int:
        """Parameters that some token is multiplied with: of all experts."""
        return self.weights + self.total - self.active

    @property
    def cache_bytes(self) -> int:
        """Bytes that a token leaves in the cache of all layers, in bf16."""
        return self.layers * self.cache_numbers * CACHE_NUMBER_BYTES

    def size(self) -> ModelSize:
        """Returns the part that is told."""
        per_token = self.cache_bytes
        return ModelSize(self.total, self.active, self.cache_numbers, per_token, per_token * self.context)


def distilled_weights(dense_source: DenseSource, target: Shape, settings: ConvertSettings) -> int:
    """Returns how many parameters the end-to-end stage of a conversion trains."""
    carved = 3 * target.layers * target.hidden * target.neurons * (settings.experts == "carve")
    if settings.exact:
        return carved
    return target.total if is_small(dense_source) else target.layers * target.attention + carved


def source_shape(source: DenseSource) -> Shape:
    """Returns the sizes of a dense model."""
    total = source.parameters()
    table = 0 if source.tie_word_embeddings else source.vocab_size * source.hidden_size
    attention = {name: shape for name, shape in source.layer_tensors().items() if name.startswith("self_attn.")}
    return Shape(
        hidden=source.hidden_size,
        layers=source.num_hidden_layers,
        heads=source.num_attention_heads,
        neurons=source.intermediate_size,
        total=total,
        active=total,
        weights=total - table,
        attention=sum(math.prod(shape) for shape in attention.values()),
        cache_numbers=source.cache_numbers,
        decode_flops=4 * source.num_attention_heads * source.head_dim,
        vocabulary=source.vocab_size,
        context=source.max_position_embeddings,
        tables=source.vocab_size * source.hidden_size * (1 if source.tie_word_embeddings else 2),
    )


def target_shape(config: dict[str, Any]) -> Shape:
    """Returns the sizes of the model of a DeepSeek-V3 config.json."""
    total, active = deepseek_v3.count_parameters(config)
    heads, numbers = config["num_attention_heads"], deepseek_v3.cache_numbers(config)
    table = 0 if config["tie_word_embeddings"] else config["vocab_size"] * config["hidden_size"]
    return Shape(
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        neurons=config["intermediate_size"],
        total=total,
        active=active,
        weights=active - table,
        attention=deepseek_v3.attention_parameters(config),
        cache_numbers=numbers,
        decode_flops=2 * heads * (numbers + config["kv_lora_rank"]),
        vocabulary=config["vocab_size"],
        context=config["max_position_embeddings"],
        tables=config["vocab_size"] * config["hidden_size"] * (1 if config["tie_word_embeddings"] else 2),
    )


def cache_bytes_per_token(config: Mapping[str, Any]) -> int:
    """Returns the bytes that one token leaves in the cache of all layers, in bf16, of a V3 or a dense config.json."""
    numbers = deepseek_v3.cache_numbers if deepseek_v3.is_latent(config) else dense.cache_numbers
    return config["num_hidden_layers"] * numbers(config) * CACHE_NUMBER_BYTES

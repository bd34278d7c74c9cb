"""The keys of a GGUF file of architecture deepseek2, made from config.json."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from gguf import ExpertGatingFuncType, GGUFWriter, RopeScalingType

from smolseek.formats.fields import SIZE, check_fields, number
from smolseek.formats.rope import rope_parameters

ARCHITECTURE = "deepseek2"
_YARN = {"factor": number(1e-6, 1e30), "original_max_position_embeddings": SIZE} | dict.fromkeys(
    ("attention_factor", "mscale", "mscale_all_dim"), number(0, 1e30).or_null()
)
"""What YaRN's parameters must be."""


@dataclass(frozen=True)
class QueryScales:
    """Factors for the unrotated and the rotated rows of the query projection, and the mscale for the GGUF key."""

    unrotated: float = 1.0
    rotated: float = 1.0
    mscale: float = 0.0


def query_scales(config: dict[str, Any]) -> QueryScales:
    """Returns how YaRN's attention scale is split between a key of the GGUF file and the query weights.

    With m(a) = 1 + 0.1 a ln(factor), a = mscale_all_dim and r the attention factor on cos and sin, transformers
    multiplies scores by m(a)² and their rotated part by r² besides. llama.cpp multiplies all scores by m(a')², where a'
    comes from the key, and rotates with r = 1. So a' is a, or 1 if the config has none, and the query weights take the
    remaining factors.
    """
    rope = rope_parameters(config)
    if rope["rope_type"] != "yarn":
        return QueryScales()
    check_fields(rope, _YARN)
    given, factor = rope.get("mscale_all_dim") or 0.0, rope["factor"]
    key_mscale = given or 1.0
    unrotated = (_mscale(factor, given) / _mscale(factor, key_mscale)) ** 2
    return QueryScales(unrotated, unrotated * _attention_factor(rope) ** 2, key_mscale)


def add_keys(writer: GGUFWriter, config: dict[str, Any], name: str) -> None:
    """Writes the architecture's keys; `config` must have transformers' defaults filled in."""
    writer.add_type("model")
    writer.add_name(name)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    _add_attention(writer, config)
    _add_experts(writer, config)
    _add_rope(writer, config)


def _add_attention(writer: GGUFWriter, config: dict[str, Any]) -> None:
    """Writes head counts and sizes.

    llama.cpp runs MLA in its absorbed form, with one KV head as wide as a cache entry; the keys that end in `_mla` hold
    the head sizes before absorption.
    """
    rank, rope_dim = config["kv_lora_rank"], config["qk_rope_head_dim"]
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(1)
    writer.add_q_lora_rank(config["q_lora_rank"] or 0)  # llama.cpp needs the key even without a query rank
    writer.add_kv_lora_rank(rank)
    writer.add_key_length(rank + rope_dim)
    writer.add_value_length(rank)
    writer.add_key_length_mla(config["qk_nope_head_dim"] + rope_dim)
    writer.add_value_length_mla(config["v_head_dim"])


def _add_experts(writer: GGUFWriter, config: dict[str, Any]) -> None:
    groups, chosen = config["n_group"] or 1, config["topk_group"] or 1
    if chosen == groups:  # every group is chosen: llama.cpp expresses this as one group
        groups = chosen = 1
    writer.add_leading_dense_block_count(min(config["first_k_dense_replace"], config["num_hidden_layers"]))
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_group_count(groups)
    writer.add_expert_group_used_count(chosen)
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_weights_norm(bool(config["norm_topk_prob"]))
    writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)


def _add_rope(writer: GGUFWriter, config: dict[str, Any]) -> None:
    rope = rope_parameters(config)
    scales = query_scales(config)  # which checks YaRN's parameters
    writer.add_rope_dimension_count(config["qk_rope_head_dim"])
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] != "yarn":
        return
    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_factor(rope["factor"])
    writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    writer.add_rope_scaling_yarn_log_mul(0.1 * scales.mscale)  # deepseek2 stores a tenth of the mscale


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 1.0 + 0.1 * mscale * math.log(factor)


def _attention_factor(rope: dict[str, Any]) -> float:
    """Returns the factor by which transformers multiplies cos and sin under YaRN."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return _mscale(rope["factor"], rope["mscale"]) / _mscale(rope["factor"], rope["mscale_all_dim"])
    return _mscale(rope["factor"], 1.0)

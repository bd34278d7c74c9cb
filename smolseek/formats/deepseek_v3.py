"""The tensors that a DeepSeek-V3 config.json asks for, by name and shape; imports no torch.

Symbols: D hidden, H heads, N qk_nope_head_dim, R qk_rope_head_dim, V v_head_dim, C kv_lora_rank, E routed experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

DEFAULTS: dict[str, Any] = {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
}
"""What transformers takes for a field that config.json leaves out."""


def with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """A DeepSeek-V3 config.json with transformers' values for the fields that it leaves out."""
    return {**DEFAULTS, **config}


def expected_tensors(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the folder, experts one by one, as `hub.save` and transformers write them.

    Raises:
        ValueError: a size in the config is no number.
    """
    config = with_defaults(config)
    _check_sizes(config)
    hidden, layers, vocabulary = (config[name] for name in ("hidden_size", "num_hidden_layers", "vocab_size"))
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for index in range(layers):
        is_dense = index < config["first_k_dense_replace"]
        parts = [
            *_attention(config),
            *(_mlp("mlp", config, config["intermediate_size"]) if is_dense else _experts(config)),
        ]
        for name in ("input_layernorm", "post_attention_layernorm"):
            parts.append((f"{name}.weight", (hidden,)))
        tensors |= {f"model.layers.{index}.{name}": shape for name, shape in parts}
    tensors["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = (vocabulary, hidden)
    return tensors


def _check_sizes(config: Mapping[str, Any]) -> None:
    for field, default in DEFAULTS.items():
        value = config[field]
        may_be_none = field in ("q_lora_rank", "n_group", "topk_group") and value is None
        if type(default) is int and not may_be_none and (type(value) is not int or value < 0):
            raise ValueError(f"config.json: {field} {value!r}: must be a whole number; fetch the file again")


def _attention(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, heads, rank, query_rank = (
        config[name] for name in ("hidden_size", "num_attention_heads", "kv_lora_rank", "q_lora_rank")
    )
    nope, rope, value = (config[name] for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    biased = {"kv_a_proj_with_mqa": rank + rope, "o_proj": hidden}
    if query_rank is None:
        yield "self_attn.q_proj.weight", (heads * (nope + rope), hidden)
    else:
        yield "self_attn.q_a_proj.weight", (query_rank, hidden)
        yield "self_attn.q_a_layernorm.weight", (query_rank,)
        yield "self_attn.q_b_proj.weight", (heads * (nope + rope), query_rank)
        biased["q_a_proj"] = query_rank
    yield "self_attn.kv_a_proj_with_mqa.weight", (rank + rope, hidden)
    yield "self_attn.kv_a_layernorm.weight", (rank,)
    yield "self_attn.kv_b_proj.weight", (heads * (nope + value), rank)
    yield "self_attn.o_proj.weight", (hidden, heads * value)
    if config["attention_bias"]:
        yield from ((f"self_attn.{name}.bias", (width,)) for name, width in biased.items())


def _mlp(prefix: str, config: Mapping[str, Any], neurons: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden = config["hidden_size"]
    yield f"{prefix}.gate_proj.weight", (neurons, hidden)
    yield f"{prefix}.up_proj.weight", (neurons, hidden)
    yield f"{prefix}.down_proj.weight", (hidden, neurons)


def _experts(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    routed, width = config["n_routed_experts"], config["moe_intermediate_size"]
    yield "mlp.gate.weight", (routed, config["hidden_size"])
    yield "mlp.gate.e_score_correction_bias", (routed,)
    for expert in range(routed):
        yield from _mlp(f"mlp.experts.{expert}", config, width)
    yield from _mlp("mlp.shared_experts", config, width * config["n_shared_experts"])

"""DeepSeek-V3 folders: config.json fields, tensor names and shapes, and what follows from them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from smolseek.formats.fields import FLAG, LARGEST_SIZE, MOST_LAYERS, check_fields, number, whole_number

Shapes = Iterator[tuple[str, tuple[int, ...]]]
"""Pairs of a tensor's name and shape."""

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
"""transformers' values for fields that config.json leaves out."""

STOCK_FIELDS = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "num_nextn_predict_layers": 0}
"""Fields that transformers does not know. Without them llama.cpp and vLLM are silently wrong."""

SCORING_FUNCS = ("sigmoid", "softmax")
"""Router scores that our model computes. The original description asks for softmax; stock V3 has sigmoid alone."""

SOFTMAX_MODEL_TYPE = "smolseek_v3_softmax"
"""`model_type` of folders with a softmax router. It is not stock V3's, so no other loader may take them for it."""


def with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config.json with transformers' values for the fields that it leaves out."""
    return {**DEFAULTS, **config}


def is_latent(config: Mapping[str, Any]) -> bool:
    """Returns whether a config.json describes latent attention."""
    return config.get("kv_lora_rank") is not None


def has_stock_router(config: Mapping[str, Any]) -> bool:
    """Returns whether experts are scored by sigmoid, which alone is stock V3."""
    return (config.get("scoring_func") or "sigmoid") == "sigmoid"


def disk_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config.json to write: stock fields added, or a model type of our own for a softmax router."""
    tree = {**config, **STOCK_FIELDS, "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}
    if not has_stock_router(config):
        tree |= {
            "scoring_func": config["scoring_func"],
            "model_type": SOFTMAX_MODEL_TYPE,
            "architectures": ["SmolseekSoftmaxV3ForCausalLM"],
        }
    return tree


def group_problem(config: Mapping[str, Any]) -> str | None:
    """Returns what is wrong with the groups of experts, or None.

    A group is scored by its two best experts, so it needs two; the chosen groups must hold enough experts for a token.
    """
    names = ("n_routed_experts", "n_group", "topk_group", "num_experts_per_tok")
    experts, groups, chosen_groups, chosen = (1 if config.get(name) is None else config[name] for name in names)
    if groups < 1 or experts % groups or experts // groups < 2:
        return f"n_routed_experts {experts} do not make {groups} groups of two or more: change n_group"
    if not 1 <= chosen_groups <= groups:
        return f"topk_group {chosen_groups} is not between 1 and n_group {groups}"
    most = chosen_groups * (experts // groups)
    if not 1 <= chosen <= most:
        return (
            f"num_experts_per_tok {chosen} is not between 1 and the {most} experts of topk_group {chosen_groups} groups"
        )
    return None


def check_strides(config: Mapping[str, Any]) -> None:
    """Checks that transformers' grouped product of experts takes the rows of hidden states: 16 bytes, in bf16 too.

    Raises:
        ValueError: the config has experts, and a hidden size that makes other rows.
    """
    if config["first_k_dense_replace"] < config["num_hidden_layers"] and config["hidden_size"] % 8:
        raise ValueError(
            f"hidden_size {config['hidden_size']}: transformers runs experts only where it is a multiple of 8; leave "
            "out experts, or name another model"
        )


def cache_numbers(config: Mapping[str, Any]) -> int:
    """Returns W = C + R, the numbers that a token leaves in one layer's cache."""
    return config["kv_lora_rank"] + config["qk_rope_head_dim"]


def count_parameters(config: Mapping[str, Any]) -> tuple[int, int]:
    """Returns the parameters of the model and those that one token meets; a routing bias is not a parameter."""
    config = with_defaults(config)
    sizes = {name: math.prod(shape) for name, shape in expected_tensors(config).items()}
    total = sum(size for name, size in sizes.items() if not name.endswith("e_score_correction_bias"))
    routed = sum(size for name, size in sizes.items() if ".mlp.experts." in name)
    met = routed * config["num_experts_per_tok"] // config["n_routed_experts"] if routed else 0
    return total, total - routed + met


def attention_parameters(config: Mapping[str, Any]) -> int:
    """Returns the parameters of one attention block."""
    return sum(math.prod(shape) for _, shape in _attention(with_defaults(config)))


def expected_tensors(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Returns name and shape of every tensor of the folder, one for each expert, as transformers writes them.

    Raises:
        ValueError: a size in the config is not a number.
    """
    config = with_defaults(config)
    check_sizes(config)
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


_RULES = {int: whole_number(0, LARGEST_SIZE), bool: FLAG, float: number(0, 1e30)}
_MOST_EXPERTS = 1_000_000  # of all layers together; their names are held in memory


def check_sizes(config: Mapping[str, Any]) -> None:
    """Checks the fields that sizes and strides come from; those that are left out have transformers' defaults.

    Raises:
        ValueError: a field is no number of its kind, or there are too many experts.
    """
    config = with_defaults(config)
    rules = {field: _RULES[type(default)] for field, default in DEFAULTS.items()}
    rules |= {field: rules[field].or_null() for field in ("q_lora_rank", "n_group", "topk_group")}
    check_fields(config, rules | {"num_hidden_layers": whole_number(0, MOST_LAYERS)})
    experts, layers = config["n_routed_experts"], config["num_hidden_layers"] - config["first_k_dense_replace"]
    if experts * layers > _MOST_EXPERTS:
        raise ValueError(
            f"config.json: n_routed_experts {experts:,}: too many for {layers:,} layers; fetch the file again"
        )


def _attention(config: Mapping[str, Any]) -> Shapes:
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


def _mlp(prefix: str, config: Mapping[str, Any], neurons: int) -> Shapes:
    hidden = config["hidden_size"]
    yield f"{prefix}.gate_proj.weight", (neurons, hidden)
    yield f"{prefix}.up_proj.weight", (neurons, hidden)
    yield f"{prefix}.down_proj.weight", (hidden, neurons)


def _experts(config: Mapping[str, Any]) -> Shapes:
    routed, width = config["n_routed_experts"], config["moe_intermediate_size"]
    yield "mlp.gate.weight", (routed, config["hidden_size"])
    yield "mlp.gate.e_score_correction_bias", (routed,)
    for expert in range(routed):
        yield from _mlp(f"mlp.experts.{expert}", config, width)
    yield from _mlp("mlp.shared_experts", config, width * config["n_shared_experts"])

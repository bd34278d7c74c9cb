"""What a conversion will write: the DeepSeek-V3 config.json of a dense source and settings; dicts alone, no torch."""

from __future__ import annotations

import math
from typing import Any

from smolseek.config import ConvertSettings

CACHE_SHARE = 0.4
"""Share of the source's cache that a portable conversion keeps when no sizes are given."""
EXACT_NOPE_DIM = 0
"""Unrotated query width of the exact conversion, where the scores need none (stock transformers takes 0)."""
COPIES = 4
"""Copies of the routed neurons that upcycling makes when the number of routed experts is not given."""

_REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
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
    "quantization_config": None,
}
_MISTRAL_DEFAULTS = {"num_key_value_heads": 8, "max_position_embeddings": 4096 * 32, "sliding_window": 4096}
_DEFAULTS = {"llama": _LLAMA_DEFAULTS, "mistral": _LLAMA_DEFAULTS | _MISTRAL_DEFAULTS}
_WANTED = (
    ("quantization_config", None, "quantised weights are not converted; name the checkpoint it was made from"),
    ("sliding_window", None, "MLA attends to the whole prefix; name a checkpoint without a window"),
    ("attention_bias", False, "biases on the attention's projections are not converted; name a model without them"),
    ("mlp_bias", False, "stock DeepSeek-V3 has no bias in its MLP; name a model without it"),
    ("hidden_act", "silu", "stock DeepSeek-V3 is SwiGLU; name a model with it"),
)
_ROPE_FIELDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
_EXPERT_FIELDS = ("n_shared_experts", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")


def read_source(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of a Llama or Mistral config.json that a conversion reads, those left out filled in as transformers
    does, plus `rope` (rope_type, rope_theta and the type's own parameters).

    Raises:
        ValueError: the architecture is unsupported, a size is missing or the sizes do not fit each other.
    """
    kind = config.get("model_type")
    if kind not in _DEFAULTS:
        raise ValueError(f"model_type {kind!r}: not supported; convert one of {', '.join(_DEFAULTS)}")
    for field in _REQUIRED:
        if type(config.get(field)) is not int or config[field] < 1:
            raise ValueError(
                f"config.json: {field} {config.get(field)!r}: must be a positive integer; fetch the file again"
            )
    source = {field: config[field] for field in _REQUIRED}
    source |= {field: config.get(field, default) for field, default in _DEFAULTS[kind].items()}
    for field, wanted, why in _WANTED:
        if (source[field] or wanted) != wanted:
            raise ValueError(f"config.json: {field} {source[field]!r}: {why}")
    heads = source["num_attention_heads"]
    source["num_key_value_heads"] = source["num_key_value_heads"] or heads
    source["head_dim"] = source["head_dim"] or source["hidden_size"] // heads
    if heads % source["num_key_value_heads"] or source["head_dim"] % 2:
        raise ValueError(
            f"config.json: {heads} heads, {source['num_key_value_heads']} KV heads, head_dim {source['head_dim']}: "
            "KV heads must divide the heads and head_dim must be even; fetch the file again"
        )
    source["dtype"] = config.get("dtype") or config.get("torch_dtype") or "float32"
    return source | {"rope": _rope(config)}


def target_config(
    source_config: dict[str, Any], settings: ConvertSettings, *, rope_theta: float | None = None
) -> dict[str, Any]:
    """The config.json (a stock `DeepseekV3ForCausalLM`'s) of a source config.json converted under `settings`.

    `rope_theta` is the one that a portable conversion found best; None keeps the source's. Sizes left out keep
    `CACHE_SHARE` of the source's cache, 2 * KV heads * head_dim numbers per token and layer.

    Raises:
        ValueError: the source or a size is impossible; one line with the value, the rule and the remedy.
    """
    source = read_source(source_config)
    attention = _exact_attention(source, settings) if settings.exact else _attention(source, settings, rope_theta)
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        **{field: source[field] for field in _REQUIRED},
        "num_key_value_heads": source["num_attention_heads"],
        "q_lora_rank": None,
        **attention,
        "v_head_dim": source["head_dim"],
        "rope_interleave": True,
        "rope_theta": attention["rope_parameters"]["rope_theta"],
        **_mlp(source["intermediate_size"], source["num_hidden_layers"], settings),
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "num_nextn_predict_layers": 0,
        "attention_dropout": 0.0,
        "use_cache": True,
        **{
            field: source[field]
            for field in (
                "hidden_act",
                "max_position_embeddings",
                "rms_norm_eps",
                "initializer_range",
                "tie_word_embeddings",
                "bos_token_id",
                "eos_token_id",
                "pad_token_id",
                "dtype",
            )
        },
        "torch_dtype": source["dtype"],
    }


def inverse_frequencies(rope: dict[str, Any], head_dim: int) -> list[float]:
    """The head_dim/2 angles per position (radians) of a source's rotary embedding.

    Raises:
        ValueError: the rope type is none of default, linear and llama3 (the same at every length), or half given.
    """
    kind = rope["rope_type"]
    if kind not in _ROPE_FIELDS:
        raise ValueError(f"rope_type {kind!r}: not supported; convert one of {', '.join(_ROPE_FIELDS)}")
    for field in _ROPE_FIELDS[kind]:
        if not isinstance(rope.get(field), int | float):
            raise ValueError(
                f"config.json: rope_type {kind}: {field} {rope.get(field)!r} is no number; fetch the file again"
            )
    plain = [rope["rope_theta"] ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    if kind == "linear":
        return [frequency / rope["factor"] for frequency in plain]
    return [_llama3(frequency, rope) for frequency in plain] if kind == "llama3" else plain


def _llama3(frequency: float, rope: dict[str, Any]) -> float:
    """Llama 3.1's scaling: long waves turn `factor` times slower, short ones as before, between them a ramp."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
    ramp = min(1.0, max(0.0, (turns - low) / (high - low)))
    return (1 - ramp) * frequency / rope["factor"] + ramp * frequency


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters, from transformers 5's `rope_parameters` or the older `rope_theta` and `rope_scaling`."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope["rope_type"] = rope.get("rope_type") or rope.pop("type", None) or "default"
    rope["rope_theta"] = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    return rope


def _attention(source: dict[str, Any], settings: ConvertSettings, rope_theta: float | None) -> dict[str, Any]:
    """Attention fields that every runtime reads: a latent, and one rotated key of the plain rope type."""
    head_dim, rope = source["head_dim"], source["rope"]
    if rope["rope_type"] != "default":
        raise ValueError(f"rope_type {rope['rope_type']!r}: a portable conversion takes the default only; try --exact")
    numbers = 2 * source["num_key_value_heads"] * head_dim
    rope_dim = settings.qk_rope_head_dim
    if rope_dim is None:
        rope_dim = next((d for d in range(head_dim // 4 * 2, 0, -2) if head_dim % d == 0), head_dim)
    if rope_dim < 2 or rope_dim % 2 or head_dim % rope_dim:
        allowed = ", ".join(str(d) for d in range(2, head_dim + 1, 2) if head_dim % d == 0)
        raise ValueError(f"qk_rope_head_dim {rope_dim}: must be even and divide head_dim {head_dim}; use {allowed}")
    largest = min(source["hidden_size"], numbers)
    rank = settings.kv_lora_rank
    if rank is None:
        rank = min(largest, max(8, 8 * round((CACHE_SHARE * numbers - rope_dim) / 8)))
    if not 1 <= rank <= largest:
        raise ValueError(f"kv_lora_rank {rank}: this source has at most {largest} directions; use 1 to {largest}")
    return {
        "kv_lora_rank": rank,
        "qk_rope_head_dim": rope_dim,
        "qk_nope_head_dim": head_dim,
        "attention_bias": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta or rope["rope_theta"]},
    }


def _exact_attention(source: dict[str, Any], settings: ConvertSettings) -> dict[str, Any]:
    """Attention fields of the exact form: every KV head's key in the rope part, values and one constant in the latent.

    longrope's factors are the wavelengths themselves over a base of 1, so no slot's frequency is rounded twice.
    """
    if settings.kv_lora_rank is not None or settings.qk_rope_head_dim is not None:
        raise ValueError("exact: its sizes follow from the source; leave out kv_lora_rank and qk_rope_head_dim")
    kv_heads, positions = source["num_key_value_heads"], source["max_position_embeddings"]
    factors = [1 / frequency for frequency in inverse_frequencies(source["rope"], source["head_dim"])] * kv_heads
    return {
        "kv_lora_rank": kv_heads * source["head_dim"] + 1,
        "qk_rope_head_dim": kv_heads * source["head_dim"],
        "qk_nope_head_dim": EXACT_NOPE_DIM,
        "attention_bias": True,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1.0,
            "factor": 1.0,
            "attention_factor": 1.0,
            "original_max_position_embeddings": positions,
            "long_factor": factors,
            "short_factor": factors,
        },
    }


def _mlp(neurons: int, layers: int, settings: ConvertSettings) -> dict[str, Any]:
    """MLP fields: dense throughout, with expert fields that nothing reads, or upcycled throughout."""
    given = [field for field in _EXPERT_FIELDS if getattr(settings, field) is not None]
    if settings.experts == "none":
        if given:
            raise ValueError(f"{given[0]} {getattr(settings, given[0])}: needs experts; set experts to upcycle")
        shared, routed, chosen, width = 1, 2, 2, neurons
    else:
        shared, routed, chosen, width = _upcycle(neurons, settings)
    copies = routed // chosen
    return {
        "n_shared_experts": shared,
        "n_routed_experts": routed,
        "num_experts_per_tok": chosen,
        "moe_intermediate_size": width,
        "n_group": copies,
        "topk_group": 1,
        "routed_scaling_factor": float(chosen),
        "first_k_dense_replace": layers if settings.experts == "none" else 0,
    }


def _upcycle(neurons: int, settings: ConvertSettings) -> tuple[int, int, int, int]:
    """Shared experts, routed experts, routed experts per token and neurons in one expert.

    A token meets `neurons` neurons as before: the shared experts and the shards of one copy of the rest.
    """
    shared, chosen = settings.n_shared_experts, settings.num_experts_per_tok
    width = settings.moe_intermediate_size
    if width is None and shared is not None and chosen is not None:
        width = neurons // max(1, shared + chosen)
    elif width is None:
        width = next((neurons // parts for parts in (8, 4) if neurons % parts == 0), None)
    if width is None or width < 1 or neurons % width:
        divisors = ", ".join(str(d) for d in range(1, neurons // 2 + 1) if neurons % d == 0)
        raise ValueError(
            f"moe_intermediate_size {width or '(not given)'}: experts must divide intermediate_size {neurons}; "
            f"use one of {divisors}"
        )
    met = neurons // width
    if chosen is None:
        chosen = met // 2 if shared is None else met - shared
    shared = met - chosen if shared is None else shared
    routed = COPIES * chosen if settings.n_routed_experts is None else settings.n_routed_experts
    if chosen < 2 or shared < 0 or shared + chosen != met:
        raise ValueError(
            f"{shared} shared + {chosen} routed experts of {width} neurons: must meet {neurons} neurons, at least 2 of "
            f"them routed; let n_shared_experts + num_experts_per_tok be {met}"
        )
    if routed < chosen or routed % chosen:
        raise ValueError(
            f"n_routed_experts {routed}: must be whole copies of {chosen} experts; use a multiple of {chosen}"
        )
    return shared, routed, chosen, width

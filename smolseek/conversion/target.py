"""What a conversion will write: the DeepSeek-V3 config.json of a dense source and settings; dicts alone, no torch."""

from __future__ import annotations

import math
from typing import Any

from smolseek.config import ConvertSettings
from smolseek.formats.runtimes import VLLM_HEADS

CACHE_SHARE = 0.4
"""Share of the source's cache that a conversion keeps when no sizes are given."""
ACTIVE_SHARE = 0.75
"""Share of the dense neurons that a token meets after carving when neither it nor the experts per token are given."""
DISTILL_STEPS = 600
"""Most steps of the end-to-end stage when their number is not given."""
DISTILL_WORK = DISTILL_STEPS * 4_000_000
"""Steps times parameters of that stage: about ten minutes on 2 CPU cores."""
_LEAST_DISTILL_STEPS = 100
COPIES = 4
"""Copies of the routed neurons that upcycling makes when the number of routed experts is not given."""

_CARVED_PARTS = 32  # what carving aims at: fine grain keeps more of the model (LOG.md)
_WIDTH_MULTIPLE = 8  # torch's grouped matmul wants strides of 16 bytes, in bf16 too
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
_SMOLLM3_DEFAULTS = {
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "pad_token_id": 128004,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "tie_word_embeddings": True,
}
_QWEN2_DEFAULTS = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "bos_token_id": None,
    "eos_token_id": None,
    "sliding_window": 4096,
}
_QWEN3_DEFAULTS = _QWEN2_DEFAULTS | {"head_dim": 128}
_DEFAULTS = {
    "llama": _LLAMA_DEFAULTS,
    "mistral": _LLAMA_DEFAULTS | _MISTRAL_DEFAULTS,
    "smollm3": _LLAMA_DEFAULTS | _SMOLLM3_DEFAULTS,
    "qwen2": _LLAMA_DEFAULTS | _QWEN2_DEFAULTS,
    "qwen3": _LLAMA_DEFAULTS | _QWEN3_DEFAULTS,
}
_ROPE_THETA = {"smollm3": 2_000_000.0}
_WANTED = (
    ("quantization_config", None, "quantised weights are not converted; name the checkpoint it was made from"),
    ("sliding_window", None, "MLA attends to the whole prefix; name a checkpoint without a window"),
    ("mlp_bias", False, "stock DeepSeek-V3 has no bias in its MLP; name a model without it"),
    ("hidden_act", "silu", "stock DeepSeek-V3 is SwiGLU; name a model with it"),
)
_ROPE_FIELDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
_ATTENTION_FIELDS = (
    "kv_lora_rank",
    "qk_rope_head_dim",
    "qk_nope_head_dim",
    "v_head_dim",
    "q_lora_rank",
    "cache",
)
_EXPERT_FIELDS = (
    "n_shared_experts",
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "first_k_dense_replace",
)


def read_source(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of a dense config.json that a conversion reads, those left out filled in as transformers does, plus
    `rope` (rope_type, rope_theta and the type's own parameters), `rope_layers` (which layers rotate), `biases` (the
    letters of the attention projections, of q, k, v and o, that have one) and `qk_norms` (whether every head's query
    and key pass an RMSNorm).

    Raises:
        ValueError: the architecture is unsupported, a size is missing or the sizes do not fit each other.
    """
    kind = config.get("model_type")
    if kind == "qwen3_moe":
        raise ValueError(
            f"model_type {kind!r}: not supported; its MLPs are experts already, and only dense ones are converted; "
            f"convert one of {', '.join(_DEFAULTS)}"
        )
    if kind not in _DEFAULTS:
        raise ValueError(f"model_type {kind!r}: not supported; convert one of {', '.join(_DEFAULTS)}")
    for field in _REQUIRED:
        if type(config.get(field)) is not int or config[field] < 1:
            raise ValueError(
                f"config.json: {field} {config.get(field)!r}: must be a positive integer; fetch the file again"
            )
    source = {"model_type": kind} | {field: config[field] for field in _REQUIRED}
    source |= {field: config.get(field, default) for field, default in _DEFAULTS[kind].items()}
    if kind in ("smollm3", "qwen2", "qwen3") and not config.get("use_sliding_window"):
        source["sliding_window"] = None  # a width is written whether or not it is used
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
    source |= {"rope": _rope(config), "rope_layers": _rope_layers(config)}
    return source | {"biases": attention_biases(config), "qk_norms": has_qk_norms(config)}


def attention_biases(config: dict[str, Any]) -> str:
    """Which of a dense model's q, k, v and o projections have a bias, as a string of those letters."""
    if config.get("model_type") == "qwen2":
        return "qkv"
    return "qkvo" if config.get("attention_bias") and config.get("model_type") != "mistral" else ""


def has_qk_norms(config: dict[str, Any]) -> bool:
    """Whether a dense model norms every head's query and key before it rotates them."""
    return bool(config.get("model_type") == "qwen3")


def target_config(
    source_config: dict[str, Any], settings: ConvertSettings, *, rope_theta: float | None = None
) -> dict[str, Any]:
    """The config.json (a stock `DeepseekV3ForCausalLM`'s) of a source config.json converted under `settings`.

    `rope_theta` is the one that a low-rank conversion found best; None keeps the source's. Sizes left out keep
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
        **attention,
        "rope_interleave": True,
        "rope_theta": attention["rope_parameters"]["rope_theta"],
        **_mlp(source["intermediate_size"], source["num_hidden_layers"], settings),
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "num_nextn_predict_layers": 0,
        "attention_dropout": 0.0,
        "use_cache": True,
        "tie_word_embeddings": source["tie_word_embeddings"] and settings.profile != "vllm",
        **{
            field: source[field]
            for field in (
                "hidden_act",
                "max_position_embeddings",
                "rms_norm_eps",
                "initializer_range",
                "bos_token_id",
                "eos_token_id",
                "pad_token_id",
                "dtype",
            )
        },
        "torch_dtype": source["dtype"],
    }


def cache_sizes(source: dict[str, Any], share: float, profile: str, rope_dim: int | None = None) -> tuple[int, int]:
    """(kv_lora_rank, qk_rope_head_dim) that keep about `share` of the source's cache under a profile's rules.

    The rotated key takes what vLLM's kernels want, or the head's own width where that is at most half of what is kept,
    else the widest divisor that is (LOG.md), unless `rope_dim` is given; the latent the rest, in whole 8s (4s of a
    small cache).
    """
    head_dim = source["head_dim"]
    numbers = 2 * source["num_key_value_heads"] * head_dim
    if rope_dim is None and profile == "vllm":
        rope_dim = VLLM_HEADS[0][1]
    if rope_dim is None:
        widest = min(head_dim, int(share * numbers / 2))
        rope_dim = next((d for d in range(widest // 2 * 2, 0, -2) if head_dim % d == 0), 2)
    unit = 8 if share * numbers >= 64 else 4
    rank = unit * round((share * numbers - rope_dim) / unit)
    return min(rank, source["hidden_size"], numbers), rope_dim


def distill_steps(source_config: dict[str, Any], settings: ConvertSettings) -> int:
    """Steps of end-to-end KL; those not given follow from the source's size, never from the machine.

    Raises:
        ValueError: a number of steps is negative.
    """
    for field in ("refine_steps", "distill_steps"):
        if (getattr(settings, field) or 0) < 0:
            raise ValueError(f"{field} {getattr(settings, field)}: must be 0 or more; 0 leaves the stage out")
    if settings.distill_steps is not None:
        return settings.distill_steps
    source = read_source(source_config)
    hidden, neurons, layers = (source[f] for f in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    parameters = source["vocab_size"] * hidden + layers * hidden * (4 * hidden + 3 * neurons)
    steps = min(DISTILL_STEPS, DISTILL_WORK // parameters)
    return steps if settings.refine_steps and steps >= _LEAST_DISTILL_STEPS else 0


def padded_width(neurons: int) -> int:
    """The moe_intermediate_size that stock runtimes can run: `neurons` and as many silent ones as it takes."""
    return -(-neurons // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE


def target_rope(source: dict[str, Any], settings: ConvertSettings, rope_theta: float | None = None) -> dict[str, Any]:
    """rope_parameters of a low-rank conversion: the source's type where the profile allows it, else the plain one.

    llama3's scaling slows only waves longer than the text it was trained on, so the plain type stands in for it.

    Raises:
        ValueError: the source's type cannot be converted under the profile.
    """
    rope = source["rope"]
    inverse_frequencies(rope, source["head_dim"])
    theta = {"rope_theta": rope_theta or rope["rope_theta"]}
    if settings.profile == "transformers":
        return {"rope_type": rope["rope_type"]} | {f: rope[f] for f in _ROPE_FIELDS[rope["rope_type"]]} | theta
    if rope["rope_type"] == "linear":
        raise ValueError(
            f"rope_type 'linear': profile {settings.profile} takes the default and llama3 only; try --exact or "
            "--profile transformers"
        )
    return {"rope_type": "default"} | theta


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
    default = _ROPE_THETA.get(config["model_type"], 10000.0)
    rope["rope_theta"] = float(rope.get("rope_theta") or config.get("rope_theta") or default)
    return rope


def _rope_layers(config: dict[str, Any]) -> tuple[bool, ...]:
    """Per layer whether it rotates queries and keys; SmolLM3 writes 1 for the layers that do."""
    layers = config["num_hidden_layers"]
    if config["model_type"] != "smollm3":
        return (True,) * layers
    interval = config.get("no_rope_layer_interval") or 4
    rotates = config.get("no_rope_layers")
    rotates = [(i + 1) % interval != 0 for i in range(layers)] if rotates is None else rotates
    if len(rotates) < layers:
        raise ValueError(
            f"config.json: no_rope_layers has {len(rotates)} entries for {layers} layers; fetch the file again"
        )
    return tuple(bool(flag) for flag in rotates[:layers])


def _attention(source: dict[str, Any], settings: ConvertSettings, rope_theta: float | None) -> dict[str, Any]:
    """Attention fields of the low-rank form: a latent, one rotated key, and biases where the profile has them."""
    biased = bool(source["biases"]) and settings.profile == "transformers"
    rank, rope_dim = _latent_sizes(source, settings)
    nope_dim, v_dim = _head_sizes(source, settings, rope_dim)
    directions = source["hidden_size"] + biased
    query_rank = directions if biased and settings.q_lora_rank is None else settings.q_lora_rank
    if query_rank is not None and not 1 <= query_rank <= directions:
        raise ValueError(
            f"q_lora_rank {query_rank}: this source has {directions} directions; use 1 to {directions}, or leave it out"
        )
    return {
        "q_lora_rank": query_rank,
        "kv_lora_rank": rank,
        "qk_rope_head_dim": rope_dim,
        "qk_nope_head_dim": nope_dim,
        "v_head_dim": v_dim,
        "attention_bias": biased,
        "rope_parameters": target_rope(source, settings, rope_theta),
    }


def _latent_sizes(source: dict[str, Any], settings: ConvertSettings) -> tuple[int, int]:
    """(kv_lora_rank, qk_rope_head_dim), given or chosen for a share of the cache."""
    share, rope_dim, rank = settings.cache, settings.qk_rope_head_dim, settings.kv_lora_rank
    if rope_dim is not None and (rope_dim < 2 or rope_dim % 2):
        raise ValueError(f"qk_rope_head_dim {rope_dim}: must be even, for it holds pairs; use 2, 4, 6 and so on")
    if share is not None and rank is not None:
        raise ValueError(f"cache {share}: it chooses the kv_lora_rank, which is given too; leave one of them out")
    if share is not None and not 0 < share <= 1:
        raise ValueError(f"cache {share}: is a share of the source's cache; use a number above 0 and up to 1")
    numbers = 2 * source["num_key_value_heads"] * source["head_dim"]
    chosen, rope_dim = cache_sizes(source, share or CACHE_SHARE, settings.profile, rope_dim)
    if share is not None and chosen < 1:
        least = math.ceil(100 * (rope_dim + 8) / numbers) / 100
        raise ValueError(
            f"cache {share}: {share * numbers:.0f} numbers a token and layer, of which the rotated key takes "
            f"{rope_dim}, leave no latent; use {least:g} or more, or a smaller qk_rope_head_dim"
        )
    largest = min(source["hidden_size"], numbers)
    rank = max(chosen, min(8, largest)) if rank is None and share is None else chosen if rank is None else rank
    if not 1 <= rank <= largest:
        raise ValueError(f"kv_lora_rank {rank}: this source has at most {largest} directions; use 1 to {largest}")
    return rank, rope_dim


def _head_sizes(source: dict[str, Any], settings: ConvertSettings, rope_dim: int) -> tuple[int, int]:
    """(qk_nope_head_dim, v_head_dim): given, the source's head_dim, or the smallest of vLLM's that hold it."""
    head_dim, given = source["head_dim"], (settings.qk_nope_head_dim, settings.v_head_dim)
    for field, size in zip(("qk_nope_head_dim", "v_head_dim"), given, strict=True):
        if size is not None and size < 1:
            raise ValueError(f"{field} {size}: must be positive; use {head_dim}, or leave it out")
    if settings.profile != "vllm":
        nope_dim, v_dim = (head_dim if size is None else size for size in given)
        return nope_dim, v_dim
    for nope_dim, rope, v_dim in VLLM_HEADS:
        fits = (given[0] or nope_dim, given[1] or v_dim, rope_dim) == (nope_dim, v_dim, rope)
        if fits and (given[0] or nope_dim >= head_dim) and (given[1] or v_dim >= head_dim):
            return nope_dim, v_dim
    raise ValueError(
        f"head sizes of head_dim {head_dim} with those given (nope {given[0]}, rope {rope_dim}, v {given[1]}): vLLM "
        f"takes (nope, rope, v) of {', '.join(map(str, VLLM_HEADS))} only; leave them out, or choose another profile"
    )


def _exact_attention(source: dict[str, Any], settings: ConvertSettings) -> dict[str, Any]:
    """Attention fields of the exact form: rotated keys of all KV heads side by side, the values, the keys that nothing
    rotates and one constant in the latent, and a query latent where queries have a bias.

    longrope's factors are the wavelengths themselves over a base of 1, so no slot's frequency is rounded twice.
    """
    if settings.profile == "vllm":
        raise ValueError("exact: needs biases and longrope, which vLLM does not read; leave out exact or profile vllm")
    if source["qk_norms"]:
        raise ValueError(
            "exact: norms on every head's query and key are not linear in the block's input, and no field of "
            "DeepSeek-V3 holds them; leave out exact"
        )
    if given := [field for field in _ATTENTION_FIELDS if getattr(settings, field) is not None]:
        raise ValueError(f"exact: its sizes follow from the source; leave out {' and '.join(given)}")
    head_dim, positions = source["head_dim"], source["max_position_embeddings"]
    channels, unrotated = source["num_key_value_heads"] * head_dim, not all(source["rope_layers"])
    factors = [1 / frequency for frequency in inverse_frequencies(source["rope"], head_dim)]
    factors *= source["num_key_value_heads"]
    return {
        "q_lora_rank": source["hidden_size"] + 1 if source["biases"] else None,
        "kv_lora_rank": (2 if unrotated else 1) * channels + 1,
        "qk_rope_head_dim": channels,
        "qk_nope_head_dim": head_dim if unrotated else 0,  # stock transformers takes 0
        "v_head_dim": head_dim,
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
    """MLP fields: dense throughout, with expert fields that nothing reads, or experts behind the first layers."""
    experts, dense_layers = settings.experts, settings.first_k_dense_replace
    given = [field for field in _EXPERT_FIELDS if getattr(settings, field)]
    if experts == "none" and given:
        raise ValueError(f"{given[0]} {getattr(settings, given[0])}: needs experts; set experts to upcycle or carve")
    if not 0 <= dense_layers < layers:
        raise ValueError(f"first_k_dense_replace {dense_layers}: leaves no layer with experts; use 0 to {layers - 1}")
    if experts != "carve" and settings.active is not None:
        raise ValueError(f"active {settings.active}: needs carved experts; set experts to carve, or leave it out")
    if experts == "upcycle":
        shared, routed, chosen, width = _upcycle(neurons, settings)
    elif experts == "carve":
        shared, routed, chosen, width = _carve(neurons, settings)
    else:
        shared, routed, chosen, width = 1, 2, 2, neurons
    return {
        "n_shared_experts": shared,
        "n_routed_experts": routed,
        "num_experts_per_tok": chosen,
        "moe_intermediate_size": width if experts == "none" else padded_width(width),
        "n_group": routed // chosen if experts == "upcycle" else 1,
        "topk_group": 1,
        "routed_scaling_factor": float(chosen),
        "first_k_dense_replace": layers if experts == "none" else dense_layers,
    }


def _upcycle(neurons: int, settings: ConvertSettings) -> tuple[int, int, int, int]:
    """Shared experts, routed experts, routed experts per token and neurons in one expert, before padding.

    A token meets `neurons` neurons as before: the shared experts and the shards of one copy of the rest.
    """
    shared, chosen = settings.n_shared_experts, settings.num_experts_per_tok
    width = settings.moe_intermediate_size
    if width is None and shared is not None and chosen is not None:
        width = neurons // max(1, shared + chosen)
    elif width is None:
        width = next((neurons // parts for parts in (8, 4) if neurons % parts == 0), None)
    width = _check_width(neurons, width)
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


def _carve(neurons: int, settings: ConvertSettings) -> tuple[int, int, int, int]:
    """Shared experts, routed experts, routed experts per token and neurons in one expert, before padding.

    All experts together are the dense neurons, and silent ones where the width does not divide them; a token meets the
    shared quarter and `active` less that, routed.
    """
    shared, routed, width = settings.n_shared_experts, settings.n_routed_experts, settings.moe_intermediate_size
    if width is None:
        asked = _CARVED_PARTS if routed is None else routed + (round(routed / 3) if shared is None else shared)
        width = -(-neurons // max(1, asked))
        width = width if routed is not None else padded_width(width)
    if not 1 <= width <= neurons // 2:
        raise ValueError(f"moe_intermediate_size {width}: must cut {neurons} neurons; use 1 to {neurons // 2}")
    parts = -(-neurons // width)
    if shared is None:
        shared = max(1, round(parts / 4)) if routed is None else parts - routed
    routed = parts - shared if routed is None else routed
    if shared < 0 or routed < 2 or shared + routed != parts:
        raise ValueError(
            f"{shared} shared + {routed} routed experts of {width} neurons: must be the {neurons} neurons, at least 2 "
            f"experts of them routed; let n_shared_experts + n_routed_experts be {parts}"
        )
    return shared, routed, _carved_per_token(parts, shared, settings), width


def _carved_per_token(parts: int, shared: int, settings: ConvertSettings) -> int:
    """num_experts_per_tok, given or the number that with the shared experts makes the `active` share."""
    active, chosen = settings.active, settings.num_experts_per_tok
    if active is not None and chosen is not None:
        raise ValueError(f"active {active}: it chooses num_experts_per_tok, which is given too; leave one of them out")
    if active is not None and not 0 < active <= 1:
        raise ValueError(f"active {active}: is a share of the dense neurons; use a number above 0 and up to 1")
    if chosen is None:
        chosen = round((active or ACTIVE_SHARE) * parts) - shared
        if active is not None and chosen < 1:
            raise ValueError(
                f"active {active}: the {shared} shared of {parts} experts leave none to route; use "
                f"{(shared + 1) / parts:.3g} or more, or fewer n_shared_experts"
            )
        chosen = max(1, chosen)
    if not 1 <= chosen <= parts - shared:
        raise ValueError(
            f"num_experts_per_tok {chosen}: there are {parts - shared} routed experts; use 1 to {parts - shared}"
        )
    return chosen


def _check_width(neurons: int, width: int | None) -> int:
    if width is None or width < 1 or neurons % width:
        divisors = ", ".join(str(d) for d in range(1, neurons // 2 + 1) if neurons % d == 0)
        raise ValueError(
            f"moe_intermediate_size {width or '(not given)'}: experts must divide intermediate_size {neurons}; "
            f"use one of {divisors}"
        )
    return width

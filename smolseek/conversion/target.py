"""The config.json that a conversion will write: a stock DeepseekV3ForCausalLM's; no torch."""

from __future__ import annotations

from typing import Any

from smolseek.config import ConvertSettings
from smolseek.conversion.expert_sizes import mlp_fields
from smolseek.conversion.sizes import ATTENTION_FIELDS, head_sizes, latent_sizes
from smolseek.formats.deepseek_v3 import STOCK_FIELDS
from smolseek.formats.dense import DenseSource
from smolseek.formats.rope import SCALING_FIELDS, inverse_frequencies, yarn_for_llama3

_KEPT_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "dtype",
)


def target_config(source: DenseSource, settings: ConvertSettings, *, rope_theta: float | None = None) -> dict[str, Any]:
    """Returns the config.json of a source converted under `settings`.

    `rope_theta` is the base that the fit of the rope slots found; None keeps the source's. Sizes left out keep
    `sizes.CACHE_SHARE` of the source's cache.

    Raises:
        ValueError: a size or a setting is impossible for this source; one line with the value, the rule, the remedy.
    """
    attention = _exact_attention(source, settings) if settings.exact else _attention(source, settings, rope_theta)
    dtype = "float32" if settings.exact else source.dtype  # bf16 would round the exactness away
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        **{field: getattr(source, field) for field in _KEPT_FIELDS},
        "num_key_value_heads": source.num_attention_heads,
        **attention,
        "rope_interleave": True,
        "rope_theta": attention["rope_parameters"]["rope_theta"],
        **mlp_fields(source.intermediate_size, source.num_hidden_layers, settings),
        "norm_topk_prob": True,
        **STOCK_FIELDS,
        "attention_dropout": 0.0,
        "use_cache": True,
        "tie_word_embeddings": source.tie_word_embeddings and settings.profile != "vllm",
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def target_rope(
    source: DenseSource, settings: ConvertSettings, rope_dim: int, rope_theta: float | None = None
) -> dict[str, Any]:
    """Returns the rope_parameters of a low-rank conversion, whose rotated key has `rope_dim` channels.

    They are the source's where the profile allows its type. Elsewhere YaRN, which DeepSeek-V3 itself has, stands in for
    llama3's type.

    Raises:
        ValueError: the source's type cannot be converted under the profile.
    """
    inverse_frequencies(source.rope, source.head_dim)
    kind = source.rope["rope_type"]
    rope = {"rope_type": kind} | {field: source.rope[field] for field in SCALING_FIELDS[kind]}
    rope["rope_theta"] = rope_theta or source.rope["rope_theta"]
    if settings.profile == "transformers" or kind == "default":
        return rope
    if kind == "linear":
        raise ValueError(
            f"rope_type 'linear': profile {settings.profile} takes the default and llama3 only; try --exact or "
            "--profile transformers"
        )
    return yarn_for_llama3(rope, rope_dim, source.max_position_embeddings)


def _attention(source: DenseSource, settings: ConvertSettings, rope_theta: float | None) -> dict[str, Any]:
    """Returns the attention fields of the low-rank form: a latent, one rotated key, biases if the profile has them."""
    biased = bool(source.biases) and settings.profile == "transformers"
    rank, rope_dim = latent_sizes(source, settings)
    nope_dim, v_dim = head_sizes(source, settings, rope_dim)
    directions = source.hidden_size + biased
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
        "rope_parameters": target_rope(source, settings, rope_dim, rope_theta),
    }


def _exact_attention(source: DenseSource, settings: ConvertSettings) -> dict[str, Any]:
    """Returns the attention fields of the exact form (docs/method.md, "Exact conversion").

    The rotated keys of all KV heads lie side by side. The latent holds the values, the keys that nothing rotates and
    one constant. A query latent is needed where queries have a bias. longrope's factors are the wavelengths themselves
    over a base of 1, so that no slot's frequency is rounded twice.
    """
    if settings.profile == "vllm":
        raise ValueError("exact: needs biases and longrope, which vLLM does not read; leave out exact or profile vllm")
    if source.qk_norms:
        raise ValueError(
            "exact: norms on every head's query and key are not linear in the block's input, and no field of "
            "DeepSeek-V3 holds them; leave out exact"
        )
    if given := [field for field in (*ATTENTION_FIELDS, "cache") if getattr(settings, field) is not None]:
        raise ValueError(f"exact: its sizes follow from the source; leave out {' and '.join(given)}")
    channels, unrotated = source.key_channels, not all(source.rope_layers)
    factors = [1 / frequency for frequency in inverse_frequencies(source.rope, source.head_dim)]
    factors *= source.num_key_value_heads
    return {
        "q_lora_rank": source.hidden_size + 1 if source.biases else None,
        "kv_lora_rank": (2 if unrotated else 1) * channels + 1,
        "qk_rope_head_dim": channels,
        "qk_nope_head_dim": source.head_dim if unrotated else 0,  # stock transformers takes 0
        "v_head_dim": source.head_dim,
        "attention_bias": True,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1.0,
            "factor": 1.0,
            "attention_factor": 1.0,
            "original_max_position_embeddings": source.max_position_embeddings,
            "long_factor": factors,
            "short_factor": factors,
        },
    }

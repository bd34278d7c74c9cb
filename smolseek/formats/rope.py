"""Rotary position embeddings as config.json describes them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from smolseek.formats.fields import check_fields, number, shown

SCALING_FIELDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""The rope types that a dense source may have, each with the fields that it needs."""


_BASE = number(1, 1e30)
_FACTOR = number(1e-6, 1e30)


def rope_parameters(config: Mapping[str, Any], default_theta: float = 10_000.0) -> dict[str, Any]:
    """Returns the rotary parameters of a config.json; `rope_type` and `rope_theta` are always among them.

    transformers 5 writes one mapping `rope_parameters`. Older files have `rope_scaling`, which counts where both are
    there, and `rope_theta`, which counts where the mapping has none.

    Raises:
        ValueError: the mapping is none, or differs between layers; or the type is no text, or the base no number.
    """
    rope = _mapping(config, "rope_scaling") or _mapping(config, "rope_parameters")
    old_type = rope.pop("type", "default")
    rope = {"rope_type": old_type, "rope_theta": config.get("rope_theta", default_theta)} | rope
    if not isinstance(rope["rope_type"], str):
        raise ValueError(f"config.json: rope_type {shown(rope['rope_type'])}: must be a text; fetch the file again")
    check_fields(rope, {"rope_theta": _BASE})
    rope["rope_theta"] = float(rope["rope_theta"])
    return rope


def _mapping(config: Mapping[str, Any], field: str) -> dict[str, Any]:
    """Returns a mapping of rotary parameters; empty if the file has none."""
    rope = config.get(field)
    rope = {} if rope is None else rope
    if not isinstance(rope, Mapping):
        raise ValueError(f"config.json: {field} {shown(rope)}: must be a mapping; fetch the file again")
    if nested := [name for name, value in rope.items() if isinstance(value, Mapping)]:
        raise ValueError(
            f"config.json: {field} has parameters of its own for {shown(nested[0])}: every layer must rotate alike; "
            "name another model"
        )
    return dict(rope)


def inverse_frequencies(rope: Mapping[str, Any], head_dim: int) -> list[float]:
    """Returns the head_dim / 2 angles per position (radians) of a dense model's rotary embedding.

    Raises:
        ValueError: the rope type is not one of default, linear and llama3, which are the same at every length; or a
            field of the type is missing or out of range; or only a part of a head rotates.
    """
    kind = rope["rope_type"]
    if kind not in SCALING_FIELDS:
        raise ValueError(f"rope_type {shown(kind)}: not supported; convert one of {', '.join(SCALING_FIELDS)}")
    if rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(
            f"config.json: partial_rotary_factor {shown(rope['partial_rotary_factor'])}: only whole heads are "
            "converted; name another model"
        )
    check_fields(rope, dict.fromkeys(SCALING_FIELDS[kind], _FACTOR), where=f"config.json: rope_type {kind}")
    if kind == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise ValueError(
            f"config.json: low_freq_factor {rope['low_freq_factor']}: must be below high_freq_factor "
            f"{rope['high_freq_factor']}; fetch the file again"
        )
    plain = [rope["rope_theta"] ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    if kind == "linear":
        return [frequency / rope["factor"] for frequency in plain]
    return [_scale_llama3(frequency, rope) for frequency in plain] if kind == "llama3" else plain


def _scale_llama3(frequency: float, rope: Mapping[str, Any]) -> float:
    """Returns a frequency after Llama 3.1's scaling.

    Long waves turn `factor` times more slowly, short waves as before; a ramp joins the two.
    """
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
    ramp = min(1.0, max(0.0, (turns - low) / (high - low)))
    return (1 - ramp) * frequency / rope["factor"] + ramp * frequency

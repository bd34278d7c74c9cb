"""Rotary position embeddings as config.json describes them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

SCALING_FIELDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""The rope types that a dense source may have, each with the fields that it needs."""


def rope_parameters(config: Mapping[str, Any], default_theta: float = 10_000.0) -> dict[str, Any]:
    """Returns the rotary parameters of a config.json; `rope_type` and `rope_theta` are always among them.

    transformers 5 writes one mapping `rope_parameters`. Older files have `rope_scaling` and `rope_theta`.
    """
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope["rope_type"] = rope.get("rope_type") or rope.pop("type", None) or "default"
    rope["rope_theta"] = float(rope.get("rope_theta") or config.get("rope_theta") or default_theta)
    return rope


def inverse_frequencies(rope: Mapping[str, Any], head_dim: int) -> list[float]:
    """Returns the head_dim / 2 angles per position (radians) of a dense model's rotary embedding.

    Raises:
        ValueError: the rope type is not one of default, linear and llama3, which are the same at every length; or a
            field of the type is missing.
    """
    kind = rope["rope_type"]
    if kind not in SCALING_FIELDS:
        raise ValueError(f"rope_type {kind!r}: not supported; convert one of {', '.join(SCALING_FIELDS)}")
    for field in SCALING_FIELDS[kind]:
        if not isinstance(rope.get(field), int | float):
            raise ValueError(
                f"config.json: rope_type {kind}: {field} {rope.get(field)!r} is no number; fetch the file again"
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

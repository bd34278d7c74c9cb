"""Rotary position embeddings as config.json describes them."""

from __future__ import annotations

import itertools
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


YARN_STANDS_IN = "YaRN stands in for the source's rope type llama3: tokens far apart see each other a little otherwise"
"""What is said of a conversion whose rope type is YaRN."""
_NO_SCALE = 1e-6
"""As mscale and mscale_all_dim: scores keep their scale. Where these are 0 or absent, runtimes differ."""
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
    plain = _plain(rope, head_dim)
    if kind == "linear":
        return [frequency / rope["factor"] for frequency in plain]
    return [_scale_llama3(frequency, rope) for frequency in plain] if kind == "llama3" else plain


def _plain(rope: Mapping[str, Any], head_dim: int) -> list[float]:
    """Returns the angles per position (radians) without any scaling."""
    return [rope["rope_theta"] ** (-2 * i / head_dim) for i in range(head_dim // 2)]


def _scale_llama3(frequency: float, rope: Mapping[str, Any]) -> float:
    """Returns a frequency after Llama 3.1's scaling.

    Long waves turn `factor` times more slowly, short waves as before; a ramp joins the two.
    """
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
    ramp = min(1.0, max(0.0, (turns - low) / (high - low)))
    return (1 - ramp) * frequency / rope["factor"] + ramp * frequency


def target_frequencies(rope: Mapping[str, Any], rope_dim: int) -> list[float]:
    """Returns the rope_dim / 2 angles per position (radians) of a converted model: YaRN's, or as a dense model's."""
    if rope["rope_type"] != "yarn":
        return inverse_frequencies(rope, rope_dim)
    fast, slow = (_slot_of(rope[beta], rope, rope_dim) for beta in ("beta_fast", "beta_slow"))
    first, last = max(math.floor(fast), 0), min(math.ceil(slow), rope_dim - 1)
    shares = [min(1.0, max(0.0, (slot - first) / (last - first or 0.001))) for slot in range(rope_dim // 2)]
    plain = _plain(rope, rope_dim)
    return [share * angle / rope["factor"] + (1 - share) * angle for share, angle in zip(shares, plain, strict=True)]


def _slot_of(turns: float, rope: Mapping[str, Any], rope_dim: int) -> float:
    """Returns the slot, with a fraction, that turns so often within the original context (YaRN, section 3.2)."""
    radians = turns * 2 * math.pi / rope["original_max_position_embeddings"]
    return -rope_dim * math.log(radians) / (2 * math.log(rope["rope_theta"]))


def yarn_for_llama3(rope: Mapping[str, Any], rope_dim: int, positions: int) -> dict[str, Any]:
    """Returns the parameters of YaRN, or of the plain type, whose angles are nearest to those of llama3's type.

    Both types slow long waves down by `factor`. Between short waves and long ones llama3's ramp is straight over turns,
    YaRN's is straight over slots, from one whole slot to another, which `beta_fast` and `beta_slow` name by their turns
    within YaRN's original context. That context is `positions` / `factor`, as runtimes expect. Nearest is what errs
    least after many tokens: the sum of log(1 + |error of a slot's angle| * llama3's original context).
    """
    factor, theta = rope["factor"], {"rope_theta": rope["rope_theta"]}
    context = max(1, round(positions / factor))
    wanted = inverse_frequencies(rope, rope_dim)

    def yarn(first: int, last: int) -> dict[str, Any]:
        fast, slow = (
            context * theta["rope_theta"] ** (-2 * slot / rope_dim) / (2 * math.pi)
            for slot in (first + 0.5, last - 0.5)
        )
        shape = {"factor": factor, "original_max_position_embeddings": context, "beta_fast": fast, "beta_slow": slow}
        return {"rope_type": "yarn", **theta, **shape, "mscale": _NO_SCALE, "mscale_all_dim": _NO_SCALE}

    def error(candidate: dict[str, Any]) -> float:
        angles = target_frequencies(candidate, rope_dim)
        return sum(
            math.log1p(abs(a - b) * rope["original_max_position_embeddings"])
            for a, b in zip(angles, wanted, strict=True)
        )

    pairs = itertools.combinations(range(rope_dim // 2 + 1), 2)
    return min([{"rope_type": "default"} | theta, *(yarn(*pair) for pair in pairs)], key=error)

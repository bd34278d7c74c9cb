"""How fast a converted model decodes beside its source, by count of operations and of bytes that are read.

Symbols: H num_attention_heads, d head_dim, C kv_lora_rank, R qk_rope_head_dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from smolseek.formats.dense import read_source
from smolseek.machine import Machine
from smolseek.planning.shapes import Shape, source_shape, target_shape

FASTER = 1.25
"""Least counted gain that a plan calls one: SmolLM2-135M in a prebuilt llama.cpp gained up to 0.1 more or
less than counted."""
DECODED_SEQUENCES = (1, 8, 64)
"""Numbers of sequences side by side for which decoding is counted."""


@dataclass(frozen=True)
class Decoding:
    """Decoding some sequences side by side, by count of the bytes that are read and of the operations."""

    sequences: int
    gain: float
    """Dense time of a step over the converted model's, where all sequences are of the largest length."""
    faster_from_tokens: int | None
    """Length from which the gain is `FASTER`; None: at no length that the model takes."""


def count_decoding(
    source_config: dict[str, Any], target_config: dict[str, Any], machine: Machine, sequences: int, tokens: int
) -> float:
    """Returns how many times as fast the converted model decodes, by count, behind so many cached tokens.

    A step takes (2 weights bytes) / bandwidth, (2 weights flops) / peak a sequence, and per cached position, layer and
    sequence cache bytes / bandwidth + attention flops / peak. Attention takes 4 H d flops in the dense model and
    2 H (C + R) + 2 H C absorbed (DeepSeek-V2, section 2.1.2). Several sequences read the experts of each.
    """
    source, target = source_shape(read_source(source_config)), target_shape(target_config)
    return _gain(_decode(source, machine, sequences), _decode(target, machine, sequences), tokens)


def count_sequences(source: Shape, target: Shape, machine: Machine, sequences: int) -> Decoding:
    """Returns how so many sequences of the source's largest length decode side by side."""
    before, after = (_decode(shape, machine, sequences) for shape in (source, target))
    saved = before[1] - FASTER * after[1]
    length = max(0, math.ceil((FASTER * after[0] - before[0]) / saved)) if saved > 0 else None
    length = None if length is None or length > source.context else length
    return Decoding(sequences, _gain(before, after, source.context), length)


def _gain(before: tuple[float, float], after: tuple[float, float], tokens: int) -> float:
    """Returns the first time over the second, of seconds without context and more for each cached position."""
    return (before[0] + tokens * before[1]) / (after[0] + tokens * after[1])


def _decode(shape: Shape, machine: Machine, sequences: int) -> tuple[float, float]:
    """Returns the seconds of a step without context, and the seconds more for each cached position of all sequences."""
    read, each = min(shape.stored, sequences * shape.weights), 2 * shape.weights / machine.flops_per_second
    cached = shape.cache_bytes / machine.bytes_per_second
    cached += shape.layers * shape.decode_flops / machine.flops_per_second
    return 2 * read / machine.bytes_per_second + sequences * each, sequences * cached

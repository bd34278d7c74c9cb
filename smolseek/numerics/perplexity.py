"""Perplexity. No torch: cards and reports read it too."""

from __future__ import annotations

import math


def perplexity(loss: float) -> float:
    """Returns e^loss, of a loss in nats per token or a difference of two; at most e^700, for floats end at e^709."""
    return math.exp(min(loss, 700.0))

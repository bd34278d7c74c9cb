"""Perplexity. No torch: cards and reports read it too."""

from __future__ import annotations

import math


def perplexity(loss: float) -> float:
    """Returns e^loss, for a loss in nats per token, or of a difference of two losses; e^700 above that, for floats end
    at e^709.
    """
    return math.exp(min(loss, 700.0))

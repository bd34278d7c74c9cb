"""Perplexity stays finite."""

import math

from smolseek.numerics.perplexity import perplexity


def test_perplexity_is_e_to_the_loss_and_finite():
    assert perplexity(2.0) == math.exp(2.0)
    assert math.isfinite(perplexity(1e9))

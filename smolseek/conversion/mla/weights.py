"""What the closed form works on: a dense block's weights and the sizes of its heads.

Shapes: H num_attention_heads, d head_dim, D hidden_size, k key channels, X = D, or D + 1 where a constant stands for
biases.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Projections(NamedTuple):
    """The dense block's weights: query (H · d, X), key and value (k, X), output (D, H · d) and its bias (D,).

    Biases of query, key and value are the last column, X = D + 1.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    output_bias: Tensor | None = None


class HeadSizes(NamedTuple):
    """Widths of a head: the source's head_dim, and the target's qk_nope_head_dim and v_head_dim."""

    head_dim: int
    nope_dim: int
    v_dim: int

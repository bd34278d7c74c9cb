"""Equal parts of a dimension."""

from __future__ import annotations


def even_slices(size: int, count: int) -> list[slice]:
    """Returns `count` slices that cover `size` elements, in order; their lengths differ by at most one."""
    return [slice(size * i // count, size * (i + 1) // count) for i in range(count)]

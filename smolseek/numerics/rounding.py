"""Rounding of trained weights to 16 bits without losing what training moved by less than one step of them.

Shapes: Z numbers, flattened.
"""

from __future__ import annotations

import torch
from torch import Tensor

_DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}
"""Mantissa bits of fp32 that a dtype lacks."""
_AT_ONCE = 2**22


def rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a tensor in `dtype`; fp32 goes up or down to 16 bits at random, so that the mean error is zero.

    A number goes to either neighbour with a probability that falls with its distance (stochastic rounding: Gupta et
    al., 2015, section 3.1). A checkpoint's weights lie on the grid of its 16 bits, and a short training moves most of
    them by less than half a step of it. To the nearest they would go back to where they began (docs/method.md,
    "Rounding"). A number that `dtype` holds stays as it is. Equal tensors are rounded equally: the seed is a sum over
    their bits.
    """
    dropped = _DROPPED_BITS.get(dtype)
    if tensor.dtype != torch.float32 or dropped is None:
        return tensor.to(dtype)
    flat_Z = tensor.detach().contiguous().reshape(-1)
    generator = torch.Generator(flat_Z.device).manual_seed(int(flat_Z.view(torch.int32).sum()) % 2**63)
    out_Z = torch.empty_like(flat_Z, dtype=dtype)
    for start in range(0, len(flat_Z), _AT_ONCE):
        part_Z = flat_Z[start : start + _AT_ONCE]
        noise_Z = torch.randint(2**dropped, part_Z.shape, dtype=torch.int32, device=part_Z.device, generator=generator)
        bits_Z = (part_Z.view(torch.int32) + noise_Z) >> dropped << dropped
        out_Z[start : start + _AT_ONCE] = torch.where(part_Z.isfinite(), bits_Z.view(torch.float32), part_Z)
    return out_Z.reshape(tensor.shape)

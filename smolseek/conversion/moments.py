"""Second moments that the closed form weighs errors by: of block inputs, of loss gradients, of normalised latents.

Shapes: N tokens in one row, D hidden_size, X entries of a block's input, k key (or value) channels, Z channels of all
queries and keys, C kv_lora_rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from smolseek.conversion.running_sum import OuterSum
from smolseek.model.attention import LATENT_NORM_EPS

UNROTATED, VALUE, ROTATED, SLOT = range(4)
"""The paths of `LayerMoments.fisher_4k4k`."""


@dataclass(frozen=True)
class LayerMoments:
    """One layer's E[x xᵀ] (X, X) of the normed block input x, and E[g gᵀ] of the log-likelihood's gradient g.

    Where the key projection has a bias, x ends in a constant 1 (X = D + 1), here and in `NormMoments`. g is taken at a
    token's values and at its keys on three paths to the scores: not rotated, rotated as in the source, rotated by the
    frequencies of the target's rope slots. Where every head's query and key pass a norm, z is all of them behind it,
    queries first: E[z xᵀ] and E[z²].
    """

    input_XX: Tensor
    fisher_4k4k: Tensor
    heads_ZX: Tensor | None = None
    heads_energy_Z: Tensor | None = None
    inputs: Callable[[], Iterable[Tensor]] = tuple
    """Reads x again, some tokens (N, X) at once."""

    def fisher(self, rows: Sequence[int], columns: Sequence[int]) -> Tensor:
        """Returns the block (len(rows) * k, len(columns) * k) between two lists of paths."""
        lines = [torch.cat([self.fisher_4k4k[row, :, column] for column in columns], dim=1) for row in rows]
        return torch.cat(lines)

    def to(self, device: torch.device) -> LayerMoments:
        """Returns the same moments on a device."""
        moved: dict[str, Any] = {n: tensor.to(device) for n, tensor in vars(self).items() if isinstance(tensor, Tensor)}
        return replace(self, **moved)


@dataclass(frozen=True)
class NormMoments:
    """E[n nᵀ] (C, C) and E[x nᵀ] (X, C) of the normalised latent n = c / rms(c)."""

    latent_CC: Tensor
    cross_XC: Tensor


def norm_moments(moments: LayerMoments, encoder_CX: Tensor) -> NormMoments:
    """Returns the moments of the latent c = E x after its RMSNorm."""
    latent, cross = OuterSum(), OuterSum()
    for inputs_NX in moments.inputs():
        x_NX = inputs_NX[:, : encoder_CX.shape[1]].to(encoder_CX.device).double()
        c_NC = x_NX @ encoder_CX.T
        normed_NC = c_NC * torch.rsqrt(c_NC.square().mean(-1, keepdim=True) + LATENT_NORM_EPS)
        latent.add(normed_NC)
        cross.add(x_NX, normed_NC)
    latent.end()
    cross.end()
    return NormMoments(latent.read(), cross.read())

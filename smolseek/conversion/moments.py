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
    """One layer's E[a x xᵀ] (X, X) of the normed block input x, and E[g gᵀ / a] of the log-likelihood's gradient g.

    a is the weight of a token, 1 on the mean, and stands in all means here and in `NormMoments` (docs/method.md,
    "Calibration").

    Where the key projection has a bias, x ends in a constant 1 (X = D + 1), here and in `NormMoments`. g is taken at a
    token's values and at its keys on three paths to the scores: not rotated, rotated as in the source, rotated by the
    frequencies of the target's rope slots. Where every head's query and key pass a norm, z is all of them behind it,
    queries first: E[a z xᵀ] and E[a z²].
    """

    input_XX: Tensor
    fisher_4k4k: Tensor
    heads_ZX: Tensor | None = None
    heads_energy_Z: Tensor | None = None
    inputs: Callable[[], Iterable[tuple[Tensor, Tensor]]] = tuple
    """Reads x and a again, some tokens (N, X) and (N, 1) at once."""

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
    """E[a n nᵀ] (C, C) and E[a x nᵀ] (X, C) of the normalised latent n = c / rms(c)."""

    latent_CC: Tensor
    cross_XC: Tensor


def input_mean(moments: LayerMoments) -> Tensor:
    """Returns E[a x] (X) of the inputs; zeros where there are none."""
    total_X, count = torch.zeros_like(moments.input_XX[0]), 0
    for inputs_NX, weight_N1 in moments.inputs():
        total_X += (weight_N1 * inputs_NX[:, : len(total_X)]).to(total_X.device).double().sum(0)
        count += len(inputs_NX)
    return total_X / max(count, 1)


def norm_moments(moments: LayerMoments, encoder_CX: Tensor) -> NormMoments:
    """Returns the moments of the latent c = E x after its RMSNorm."""
    latent, cross = OuterSum(), OuterSum()
    for inputs_NX, weight_N1 in moments.inputs():
        root_N1 = weight_N1.to(encoder_CX.device).double().sqrt()
        x_NX = inputs_NX[:, : encoder_CX.shape[1]].to(encoder_CX.device).double()
        c_NC = x_NX @ encoder_CX.T
        weighted_NC = root_N1 * c_NC * torch.rsqrt(c_NC.square().mean(-1, keepdim=True) + LATENT_NORM_EPS)
        latent.add(weighted_NC)
        cross.add(root_N1 * x_NX, weighted_NC)
    latent.end()
    cross.end()
    return NormMoments(latent.read(), cross.read())

"""Parts of the source that the target has no place for, folded into its linear maps: norms on heads, biases.

Shapes: D hidden_size, X entries of the block's input (D, or D + 1 where a constant stands for biases), Z channels of
all queries and keys.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from smolseek.conversion.mla.algebra import regress
from smolseek.conversion.mla.weights import Projections
from smolseek.conversion.moments import LayerMoments

_DAMPING = 1e-9


def fold_norms(weights: Projections, moments: LayerMoments) -> tuple[Projections, LayerMoments, float]:
    """Returns weights and moments without norms on every head's query and key, and the energy lost.

    z = norm(W x) is nearly E[z xᵀ] E[x xᵀ]⁻¹ x; no linear map is nearer in E|z - W x|². The energy lost is a share of
    E|z|², of the queries or of the keys, whichever is more.
    """
    assert moments.heads_ZX is not None and moments.heads_energy_Z is not None
    made_ZX = regress(moments.heads_ZX, moments.input_XX, _DAMPING)
    lost_Z = moments.heads_energy_Z + ((made_ZX @ moments.input_XX - 2 * moments.heads_ZX) * made_ZX).sum(-1)
    sizes = [len(weights.query), len(weights.key)]
    pairs = zip(lost_Z.split(sizes), moments.heads_energy_Z.split(sizes), strict=True)
    lost = max(float(part.sum() / whole.sum().clamp(min=1e-300)) for part, whole in pairs)
    query, key = made_ZX.split(sizes)
    plain = replace(moments, heads_ZX=None, heads_energy_Z=None)
    return weights._replace(query=query, key=key), plain, max(0.0, lost)


def fold_bias(weights: Projections, moments: LayerMoments) -> tuple[Projections, LayerMoments, float]:
    """Returns weights and moments without the column of biases, and the share of the biases' energy that is lost.

    W x + b is nearly (W + b wᵀ) x where wᵀ x stays near 1; w = E[x xᵀ]⁻¹ E[x] minimises E(wᵀ x - 1)², that share.
    """
    hidden = len(weights.output)
    if weights.key.shape[1] == hidden:
        return weights, moments, 0.0
    input_DD, mean_D = moments.input_XX[:hidden, :hidden], moments.input_XX[:hidden, hidden]
    w_D = regress(mean_D[None], input_DD, _DAMPING)[0]
    lost = 1 - 2 * mean_D @ w_D + w_D @ input_DD @ w_D
    query, key, value = (rows[:, :hidden] + torch.outer(rows[:, hidden], w_D) for rows in weights[:3])
    return Projections(query, key, value, *weights[3:]), replace(moments, input_XX=input_DD), float(lost)

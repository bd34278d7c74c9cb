"""Linear algebra that several steps of the conversion share; float64 and complex128, on the device of the inputs.

Shapes: P matrices, R rows, A inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

_FISHER_DAMPING = 1e-3


def damping(moment: Tensor) -> Tensor:
    """Returns a diagonal matrix with a little of the moment's own diagonal: their sum can be inverted at any scale."""
    diagonal = moment.diagonal().real
    return torch.diag_embed(_FISHER_DAMPING * diagonal + 1e-9 * diagonal.mean() + 1e-300).to(moment.dtype)


def inverse_root(moment: Tensor) -> Tensor:
    """Returns M^-½ of a positive definite matrix."""
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp(min=values[-1:] * 1e-15)
    return (vectors * values.rsqrt()) @ vectors.mH


def root(moment_PAA: Tensor) -> Tensor:
    """Returns M^½ of one positive semidefinite matrix, or of each of several."""
    values, vectors = torch.linalg.eigh(moment_PAA)
    return (vectors * values.clamp(min=0).sqrt().unsqueeze(-2)) @ vectors.mT


def regress(cross_OA: Tensor, moment_AA: Tensor, share: float) -> Tensor:
    """Returns E[y xᵀ] (E[x xᵀ] + λ)⁻¹, the map of x nearest to y; λ is that share of the mean energy of x."""
    energy = moment_AA.diagonal().mean()
    damped_AA = moment_AA + share * energy * torch.eye(len(moment_AA), dtype=moment_AA.dtype, device=moment_AA.device)
    return torch.linalg.solve(damped_AA, cross_OA.mT).mT


def weighted_energy(fisher: Tensor, moment: Tensor) -> float:
    """Returns tr(F M), the expected squared first-order change of the log-likelihood."""
    return float((fisher * moment.mT).sum().real)

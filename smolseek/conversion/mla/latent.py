"""The latent: what it has to carry, its encoder, and its decoder behind the latent norm.

Shapes: X entries of the block's input, k key channels, Y = 2 k (keys, then values), c = k / 2 complex key channels,
s = R / 2 rope slots, C kv_lora_rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from smolseek.conversion.mla.algebra import damping, regress, weighted_energy
from smolseek.conversion.mla.rope_slots import RopePlan, complex_moment, fit_rope_slots, to_complex, to_real
from smolseek.conversion.mla.weights import Projections
from smolseek.conversion.moments import ROTATED, SLOT, UNROTATED, VALUE, LayerMoments, NormMoments

LATENT_RMS = 64.0
"""Scale of the latent before its norm: far above the eps that runtimes add (1e-6 or rms_norm_eps)."""
_REFIT_DAMPING = 1e-6


@dataclass(frozen=True)
class Compression:
    """One layer's low-rank form before the latent norm is absorbed."""

    slot_encoder_sc: Tensor
    slot_decoder_cs: Tensor
    target_YX: Tensor
    """What the latent is to carry: y = target x, unrotated keys and values."""
    encoder_CX: Tensor
    rope_energy_kept: float
    """Share of the keys' Fisher-weighted energy that the slots carry."""


def compress(weights: Projections, moments: LayerMoments, plan: RopePlan, head_dim: int, rank: int) -> Compression:
    """Returns the rope slots, what they leave to the latent, and the latent's encoder (C, X).

    What the slots leave is a regression (docs/method.md, "The latent's target"). The loss changes by gᵀ(error) with
    another gradient g on every path of a key (rotated as in the source, rotated by the slot, not rotated). The
    unrotated keys and values that hurt least are therefore Y = F_LL⁻¹ F_LT T, with L the latent's paths
    [unrotated, value] and T what it stands in for [keys, -slot keys, values]. Damping pulls Y towards
    [keys - slot keys; values].
    """
    key_cX = to_complex(weights.key, head_dim)
    energy_cc = key_cX @ moments.input_XX.to(key_cX.dtype) @ key_cX.mH
    slot_cc, cross_cc = (complex_moment(moments.fisher([SLOT], [path]), head_dim) for path in (SLOT, ROTATED))
    encoder_sc, decoder_cs = fit_rope_slots(energy_cc, slot_cc, cross_cc, plan, head_dim)
    slot_kX = to_real(decoder_cs @ (encoder_sc @ key_cX), head_dim)

    paths = [UNROTATED, VALUE]
    fisher_YY = moments.fisher(paths, paths)
    extra_YY = damping(fisher_YY)
    fisher_YY = fisher_YY + extra_YY
    stands_for = torch.cat([weights.key, -slot_kX, weights.value])
    plain_YX = torch.cat([weights.key - slot_kX, weights.value])
    pull_YX = moments.fisher(paths, [ROTATED, SLOT, VALUE]) @ stands_for + extra_YY @ plain_YX
    target_YX = torch.linalg.solve(fisher_YY, pull_YX)

    rotated_cc = complex_moment(moments.fisher([ROTATED], [ROTATED]), head_dim)
    left_cX = key_cX - decoder_cs @ (encoder_sc @ key_cX)
    left_cc = left_cX @ moments.input_XX.to(key_cX.dtype) @ left_cX.mH
    kept = 1 - weighted_energy(rotated_cc, left_cc) / max(weighted_energy(rotated_cc, energy_cc), 1e-300)
    return Compression(encoder_sc, decoder_cs, target_YX, latent_encoder(target_YX, fisher_YY, moments, rank), kept)


def latent_encoder(target_YX: Tensor, fisher_YY: Tensor, moments: LayerMoments, rank: int) -> Tensor:
    """Returns the encoder (C, X) of the best rank-C stand-in for `target`.

    That is Uᵀ F^½ Y with U the top C eigenvectors of F^½ Y Σ Yᵀ F^½, at the scale of `scale_encoder`.
    """
    # Another root of F would only turn U, and Cholesky's is the cheapest.
    weighted_YX = torch.linalg.cholesky(fisher_YY).mT @ target_YX
    values, vectors = torch.linalg.eigh(weighted_YX @ moments.input_XX @ weighted_YX.mT)
    values_C, u_YC = values[-rank:].flip(-1), vectors[:, -rank:].flip(-1)
    return scale_encoder(u_YC.mT @ weighted_YX, values_C, moments.input_XX)


def scale_encoder(rows_CX: Tensor, values_C: Tensor, input_XX: Tensor) -> Tensor:
    """Returns encoder rows, each times λ^-¼, together at a root mean square of `LATENT_RMS`.

    λ^-¼ is half-way to white: the latent's norm then varies less from token to token. Full whitening hurt (LOG.md).
    """
    floor_1 = values_C[:1] * 1e-12 + 1e-300
    encoder_CX = values_C.clamp(min=floor_1)[:, None] ** -0.25 * rows_CX
    mean_square = ((encoder_CX @ input_XX) * encoder_CX).sum() / len(encoder_CX)
    return encoder_CX * (LATENT_RMS / mean_square.clamp(min=1e-300).sqrt())


def refit_decoder(target_YX: Tensor, norm: NormMoments) -> Tensor:
    """Returns the decoder (Y, C) that minimises E|Y x - B n|² for the normalised latent n.

    B = Y E[x nᵀ] (E[n nᵀ] + λ)⁻¹ absorbs the norm better than a gain of E[rms] would. A weight on the error would not
    change B.
    """
    return regress(target_YX @ norm.cross_XC, norm.latent_CC, _REFIT_DAMPING)


def latent_errors(
    compression: Compression, decoder_YC: Tensor, moments: LayerMoments, norm: NormMoments
) -> tuple[float, float]:
    """Returns E|Y x - B n|² / E|Y x|², Fisher-weighted and plain."""
    target_YX = compression.target_YX
    whole_YY = target_YX @ moments.input_XX @ target_YX.mT
    mixed_YY = target_YX @ norm.cross_XC @ decoder_YC.mT
    error_YY = whole_YY - mixed_YY - mixed_YY.mT + decoder_YC @ norm.latent_CC @ decoder_YC.mT
    fisher_YY = moments.fisher([UNROTATED, VALUE], [UNROTATED, VALUE])
    weighted = weighted_energy(fisher_YY, error_YY) / max(weighted_energy(fisher_YY, whole_YY), 1e-300)
    return weighted, float(error_YY.trace() / whole_YY.trace().clamp(min=1e-300))

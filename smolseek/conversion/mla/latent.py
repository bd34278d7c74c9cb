"""The latent: what it has to carry, its encoder, and its decoder behind the latent norm.

Shapes: X entries of the block's input, k key channels, Y = 2 k (keys, then values), c = k / 2 complex key channels,
s = R / 2 rope slots, C kv_lora_rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from smolseek.conversion.mla.algebra import damping, regress, weighted_energy
from smolseek.conversion.mla.plans import RopePlan
from smolseek.conversion.mla.rope_slots import complex_moment, fit_rope_slots, to_complex, to_real
from smolseek.conversion.mla.weights import Projections
from smolseek.conversion.moments import (
    ROTATED,
    SLOT,
    UNROTATED,
    VALUE,
    LayerMoments,
    NormMoments,
    input_mean,
    norm_moments,
)

LATENT_RMS = 64.0
"""Scale of the latent before its norm: far above the eps that runtimes add (1e-6 or rms_norm_eps)."""
_REFIT_DAMPING = 1e-6
_CONSTANT_SIZE = 4.0
"""Root mean square of the constant coordinate, in that of all the others together."""
_CONSTANT_DAMPING = 1e-4
_LEAST_CONSTANT = 0.5
"""Share of a constant's energy that inputs must give, or there is no such coordinate."""
_MOST_ERROR = 0.9
"""A constant coordinate is taken where it leaves at most this share of the error without one."""

Encode = Callable[[Tensor, int], Tensor]
"""Returns the best encoder (C, X) of a rank C, given second moments (X, X) of inputs."""


@dataclass(frozen=True)
class Compression:
    """One layer's rope slots, and what they leave to the latent."""

    slot_encoder_sc: Tensor
    slot_decoder_cs: Tensor
    target_YX: Tensor
    """What the latent is to carry: y = target x, unrotated keys and values."""
    fisher_YY: Tensor
    rope_energy_kept: float
    """Share of the keys' Fisher-weighted energy that the slots carry."""

    def encode(self, input_XX: Tensor, rank: int) -> Tensor:
        """Returns the encoder (C, X) of the best rank-C stand-in for the target; C is at most the target's own rank.

        That is Uᵀ F^½ Y with U the top C eigenvectors of F^½ Y Σ Yᵀ F^½, at the scale of `scale_encoder`.
        """
        rank = min(rank, *self.target_YX.shape)
        # Another root of F would only turn U, and Cholesky's is the cheapest.
        weighted_YX = torch.linalg.cholesky(self.fisher_YY + damping(self.fisher_YY)).mT @ self.target_YX
        values, vectors = torch.linalg.eigh(weighted_YX @ input_XX @ weighted_YX.mT)
        values_C, u_YC = values[-rank:].flip(-1), vectors[:, -rank:].flip(-1)
        return scale_encoder(u_YC.mT @ weighted_YX, values_C, input_XX)


class Latent(NamedTuple):
    """A latent, what is read behind its norm, and the relative error of that, Fisher-weighted and plain."""

    encoder_CX: Tensor
    decoder_YC: Tensor
    normed_CC: Tensor
    """Second moments of the normalised latent."""
    weighted_error: float
    plain_error: float


def compress(weights: Projections, moments: LayerMoments, plan: RopePlan, head_dim: int) -> Compression:
    """Returns the rope slots and what they leave to the latent.

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
    stands_for = torch.cat([weights.key, -slot_kX, weights.value])
    plain_YX = torch.cat([weights.key - slot_kX, weights.value])
    pull_YX = moments.fisher(paths, [ROTATED, SLOT, VALUE]) @ stands_for + extra_YY @ plain_YX
    target_YX = torch.linalg.solve(fisher_YY + extra_YY, pull_YX)

    rotated_cc = complex_moment(moments.fisher([ROTATED], [ROTATED]), head_dim)
    left_cX = key_cX - decoder_cs @ (encoder_sc @ key_cX)
    left_cc = left_cX @ moments.input_XX.to(key_cX.dtype) @ left_cX.mH
    kept = 1 - weighted_energy(rotated_cc, left_cc) / max(weighted_energy(rotated_cc, energy_cc), 1e-300)
    return Compression(encoder_sc, decoder_cs, target_YX, fisher_YY, kept)


def fit_latent(encode: Encode, target_YX: Tensor, weight_YY: Tensor, moments: LayerMoments, rank: int) -> Latent:
    """Returns the latent of that rank, with a constant coordinate where that loses much less (docs/method.md, "The
    latent's norm")."""
    plain = _behind_norm(encode(moments.input_XX, rank), target_YX, weight_YY, moments)
    encoder_CX = _with_constant(encode, moments, rank)
    if encoder_CX is None:
        return plain
    steady = _behind_norm(encoder_CX, target_YX, weight_YY, moments)
    return steady if steady.weighted_error <= _MOST_ERROR * plain.weighted_error else plain


def _with_constant(encode: Encode, moments: LayerMoments, rank: int) -> Tensor | None:
    """Returns the encoder whose first coordinate is large and nearly the same at every token; None where none can be.

    The norm divides each latent by its size, and so forgets that size. With such a coordinate all sizes are nearly
    equal, and the norm is nearly linear. w = (Σ + λ)⁻¹ E[x] gives the constant 1 best. The other coordinates are those
    of inputs without their part along w, so that they do not correlate with it.
    """
    input_XX = moments.input_XX
    w_X = regress(input_mean(moments)[None], input_XX, _CONSTANT_DAMPING)[0]
    level_X = input_XX @ w_X
    energy = w_X @ level_X
    if rank == 1 or energy < _LEAST_CONSTANT:
        return None
    others_CX = encode(input_XX - torch.outer(level_X, level_X) / energy, rank - 1)
    others_CX = others_CX - torch.outer(others_CX @ level_X, w_X) / energy
    size = ((others_CX @ input_XX) * others_CX).sum().sqrt() * _CONSTANT_SIZE / energy.sqrt()
    return _scaled(torch.cat([size * w_X[None], others_CX]), input_XX)


def _behind_norm(encoder_CX: Tensor, target_YX: Tensor, weight_YY: Tensor, moments: LayerMoments) -> Latent:
    """Returns the latent of an encoder, its decoder fitted behind the norm."""
    norm = norm_moments(moments, encoder_CX)
    decoder_YC = refit_decoder(target_YX, norm)
    errors = latent_errors(target_YX, decoder_YC, weight_YY, moments.input_XX, norm)
    return Latent(encoder_CX, decoder_YC, norm.latent_CC, *errors)


def pad_latent(latent: Latent, rank: int) -> Latent:
    """Returns the latent with coordinates of zero up to that rank, which make the norm's output larger by √(C' / C)."""
    more, growth = rank - len(latent.encoder_CX), rank / len(latent.encoder_CX)
    return latent._replace(
        encoder_CX=F.pad(latent.encoder_CX, (0, 0, 0, more)),
        decoder_YC=F.pad(latent.decoder_YC / growth**0.5, (0, more)),
        normed_CC=F.pad(latent.normed_CC * growth, (0, more, 0, more)),
    )


def scale_encoder(rows_CX: Tensor, values_C: Tensor, input_XX: Tensor) -> Tensor:
    """Returns encoder rows, each times λ^-¼, together at a root mean square of `LATENT_RMS`.

    λ^-¼ is half-way to white: the latent's norm then varies less from token to token. Full whitening hurt (LOG.md).
    """
    floor_1 = values_C[:1] * 1e-12 + 1e-300
    return _scaled(values_C.clamp(min=floor_1)[:, None] ** -0.25 * rows_CX, input_XX)


def _scaled(encoder_CX: Tensor, input_XX: Tensor) -> Tensor:
    """Returns the encoder at a root mean square of `LATENT_RMS` over all coordinates."""
    mean_square = ((encoder_CX @ input_XX) * encoder_CX).sum() / len(encoder_CX)
    return encoder_CX * (LATENT_RMS / mean_square.clamp(min=1e-300).sqrt())


def refit_decoder(target_YX: Tensor, norm: NormMoments) -> Tensor:
    """Returns the decoder (Y, C) that minimises E|Y x - B n|² for the normalised latent n.

    B = Y E[x nᵀ] (E[n nᵀ] + λ)⁻¹ absorbs the norm better than a gain of E[rms] would. A weight on the error would not
    change B.
    """
    return regress(target_YX @ norm.cross_XC, norm.latent_CC, _REFIT_DAMPING)


def latent_errors(
    target_YX: Tensor, decoder_YC: Tensor, weight_YY: Tensor, input_XX: Tensor, norm: NormMoments
) -> tuple[float, float]:
    """Returns E|Y x - B n|² / E|Y x|², weighted and plain."""
    whole_YY = target_YX @ input_XX @ target_YX.mT
    mixed_YY = target_YX @ norm.cross_XC @ decoder_YC.mT
    error_YY = whole_YY - mixed_YY - mixed_YY.mT + decoder_YC @ norm.latent_CC @ decoder_YC.mT
    weighted = weighted_energy(weight_YY, error_YY) / max(weighted_energy(weight_YY, whole_YY), 1e-300)
    return weighted, float(error_YY.trace() / whole_YY.trace().clamp(min=1e-300))

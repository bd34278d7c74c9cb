"""Grouped-query attention to multi-head latent attention in closed form; pure functions on tensors (design §3).

Shapes: D hidden, H query heads, G KV heads, d head_dim, K = G * d key (or value) channels, Y = 2K (keys, then values),
C = K / 2 complex key channels (head by head, d / 2 frequencies each), S rope slots (qk_rope_head_dim / 2), R latent
rank, N qk_nope_head_dim. The algebra is float64 and complex128.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from smolseek.conversion.moments import ROTATED, SLOT, UNROTATED, VALUE, LayerMoments, NormMoments

LATENT_RMS = 64.0
"""Scale of the latent before its norm: far above the eps that runtimes add (1e-6 or rms_norm_eps)."""
CONSTANT = 2.0**15
"""The exact form's constant coordinate: far above any value, within fp16."""

_FISHER_DAMPING = 1e-3
_REFIT_DAMPING = 1e-6


class Projections(NamedTuple):
    """The dense block's weights: query (H * d, D), key and value (K, D)."""

    query: Tensor
    key: Tensor
    value: Tensor


@dataclass(frozen=True)
class RopePlan:
    """Which source frequencies each slot folds together; slot j turns like source frequency stride * j, its first."""

    stride: int
    folds: tuple[tuple[int, ...], ...]

    def rope_theta(self, source_theta: float, head_dim: int) -> float:
        """The target's rope_theta, under which slot j turns exactly like source frequency stride * j."""
        return source_theta ** (self.stride * 2 * len(self.folds) / head_dim)

    def slot_frequencies(self, head_dim: int) -> list[int]:
        """Per source frequency, the one that its slot turns like; what lies beyond the last slot keeps its own."""
        covered = self.stride * len(self.folds)
        return [i - i % self.stride if i < covered else i for i in range(head_dim // 2)]


@dataclass(frozen=True)
class Compression:
    """One layer's low-rank form before the latent norm is absorbed."""

    slot_encoder_SC: Tensor
    slot_decoder_CS: Tensor
    target_YD: Tensor
    """What the latent is to carry: y = target x, unrotated keys and values."""
    encoder_RD: Tensor
    rope_energy_kept: float
    """Share of the keys' Fisher-weighted energy that the slots carry."""


def rope_plans(head_dim: int, rope_dim: int) -> list[RopePlan]:
    """Ways to place rope_dim / 2 slots on the head_dim / 2 frequencies of the source, fastest first.

    With stride s slot j takes frequency s * j, alone or folded with its s - 1 slower neighbours; what no slot takes
    stays unrotated.
    """
    slots, widest = rope_dim // 2, head_dim // rope_dim
    plans = []
    for stride in [s for s in (1, 2, 4, 8, 16) if s < widest] + [widest]:
        for width in sorted({1, stride}):
            folds = tuple(tuple(range(stride * j, stride * j + width)) for j in range(slots))
            plans.append(RopePlan(stride, folds))
    return plans


def to_complex(rows_KD: Tensor, head_dim: int) -> Tensor:
    """Rows (heads * d, D) as complex channels (heads * d / 2, D): κ_i = k_i + j k_{i+d/2}, the pairs Llama turns."""
    first, second = rows_KD.view(-1, 2, head_dim // 2, rows_KD.shape[-1]).unbind(1)
    return torch.complex(first, second).flatten(0, 1)


def to_real(rows_CD: Tensor, head_dim: int) -> Tensor:
    """Inverse of `to_complex`."""
    heads = rows_CD.view(-1, head_dim // 2, rows_CD.shape[-1])
    return torch.cat([heads.real, heads.imag], dim=1).flatten(0, 1)


def complex_moment(moment_KK: Tensor, head_dim: int) -> Tensor:
    """E[κ λᴴ] (C, C) from E[k lᵀ] (K, K)."""
    half = head_dim // 2
    blocks = moment_KK.reshape(len(moment_KK) // head_dim, 2, half, -1, 2, half)
    real = blocks[:, 0, :, :, 0] + blocks[:, 1, :, :, 1]
    imaginary = blocks[:, 1, :, :, 0] - blocks[:, 0, :, :, 1]
    return torch.complex(real, imaginary).reshape(len(moment_KK) // 2, -1)


def interleave(rows_SD: Tensor) -> Tensor:
    """Complex rows (..., S, D) as the real rows (..., 2S, D) that V3 turns: (2i, 2i + 1) are real, imaginary."""
    return torch.view_as_real(rows_SD).movedim(-1, -2).flatten(-3, -2)


def compress(weights: Projections, moments: LayerMoments, plan: RopePlan, head_dim: int, rank: int) -> Compression:
    """Rope slots, what is left for the latent, and the latent's encoder (R, D).

    Beyond design §3, step 3: what is left is a regression. The loss changes by gᵀ(error) with another gradient g on
    every path (rotated as in the source, by the slot, not at all), so the unrotated keys and the values that hurt least
    are Y = F_LL⁻¹ F_LT T: L the latent's paths [unrotated, value], T what it stands in for [keys, -slot keys, values].
    Damped towards design's own [keys - slot keys; values].
    """
    key_CD = to_complex(weights.key, head_dim)
    energy_CC = key_CD @ moments.input_DD.to(key_CD.dtype) @ key_CD.mH
    slot_CC, cross_CC = (complex_moment(moments.fisher([SLOT], [path]), head_dim) for path in (SLOT, ROTATED))
    encoder_SC, decoder_CS = rope_slots(energy_CC, slot_CC, cross_CC, plan, head_dim)
    slot_KD = to_real(decoder_CS @ (encoder_SC @ key_CD), head_dim)

    paths = [UNROTATED, VALUE]
    fisher_YY = moments.fisher(paths, paths)
    extra_YY = damping(fisher_YY)
    fisher_YY = fisher_YY + extra_YY
    stands_for = torch.cat([weights.key, -slot_KD, weights.value])
    plain_YD = torch.cat([weights.key - slot_KD, weights.value])
    pull_YD = moments.fisher(paths, [ROTATED, SLOT, VALUE]) @ stands_for + extra_YY @ plain_YD
    target_YD = torch.linalg.solve(fisher_YY, pull_YD)

    rotated_CC = complex_moment(moments.fisher([ROTATED], [ROTATED]), head_dim)
    left_CD = key_CD - decoder_CS @ (encoder_SC @ key_CD)
    left_CC = left_CD @ moments.input_DD.to(key_CD.dtype) @ left_CD.mH
    kept = 1 - _weighted(rotated_CC, left_CC) / max(_weighted(rotated_CC, energy_CC), 1e-300)
    return Compression(encoder_SC, decoder_CS, target_YD, latent_encoder(target_YD, fisher_YY, moments, rank), kept)


def rope_slots(
    energy_CC: Tensor, slot_CC: Tensor, cross_CC: Tensor, plan: RopePlan, head_dim: int
) -> tuple[Tensor, Tensor]:
    """Encoder (S, C) and decoder (C, S) of the one complex channel that each slot keeps.

    Per slot, over the channels (KV head, frequency in the fold) with key covariance K and Fisher F at the slot's
    frequency: u is the top left singular vector of F^½ M K^½, M = F⁻¹ E[g_slot g_sourceᴴ]; encode uᴴ F^½ M, decode
    F^-½ u with unit norm. Without a fold M = 1 and this is design §3, step 2: mixing the heads of one frequency
    commutes with the rotation. Folding neighbouring frequencies does not, and M accounts for it.
    """
    channels_GF = torch.arange(len(energy_CC)).view(-1, head_dim // 2)
    encoder_SC = energy_CC.new_zeros(len(plan.folds), len(energy_CC))
    decoder_CS = energy_CC.new_zeros(len(energy_CC), len(plan.folds))
    for slot, fold in enumerate(plan.folds):
        picked = channels_GF[:, list(fold)].flatten()
        block = (picked[:, None], picked)
        extra = damping(slot_CC[block])
        inverse_root = roots(slot_CC[block] + extra)[1]
        seen = inverse_root @ (cross_CC[block] + extra)  # F^½ M
        u = torch.linalg.eigh(seen @ energy_CC[block] @ seen.mH).eigenvectors[:, -1]
        decode = inverse_root @ u
        encoder_SC[slot, picked] = (u.conj() @ seen) * decode.norm()
        decoder_CS[picked, slot] = decode / decode.norm()
    return encoder_SC, decoder_CS


def latent_encoder(target_YD: Tensor, fisher_YY: Tensor, moments: LayerMoments, rank: int) -> Tensor:
    """Encoder (R, D) of the best rank-R stand-in for `target`: Uᵀ F^½ Y, U the top R eigenvectors of F^½ Y Σ Yᵀ F^½.

    Scaled to a root mean square of `LATENT_RMS`, each coordinate by λ^-¼ first: half-way to white, the latent's norm
    varies less from token to token (design §3, step 3, where full whitening hurt).
    """
    weighted_YD = roots(fisher_YY)[0] @ target_YD
    values, vectors = torch.linalg.eigh(weighted_YD @ moments.input_DD @ weighted_YD.mT)
    values_R, u_YR = values[-rank:].flip(-1), vectors[:, -rank:].flip(-1)
    encoder_RD = values_R.clamp(min=float(values_R[0]) * 1e-12 + 1e-300)[:, None] ** -0.25 * (u_YR.mT @ weighted_YD)
    mean_square = float(((encoder_RD @ moments.input_DD) * encoder_RD).sum()) / rank
    return encoder_RD * (LATENT_RMS / math.sqrt(max(mean_square, 1e-300)))


def refit_decoder(target_YD: Tensor, norm: NormMoments) -> Tensor:
    """Decoder (Y, R) that minimises E|Y x - B n|² for the normalised latent n: B = Y E[x nᵀ] (E[n nᵀ] + λ)⁻¹.

    In place of a gain of E[rms] (design §2, the latent RMSNorm, 3); no weight on the error would change B.
    """
    diagonal_R = norm.latent_RR.diagonal()
    damped_RR = norm.latent_RR + torch.diag_embed(
        torch.full_like(diagonal_R, _REFIT_DAMPING * float(diagonal_R.mean()))
    )
    return torch.linalg.solve(damped_RR, (target_YD @ norm.cross_DR).mT).mT


def latent_errors(
    compression: Compression, decoder_YR: Tensor, moments: LayerMoments, norm: NormMoments
) -> tuple[float, float]:
    """E|Y x - B n|² / E|Y x|², Fisher-weighted and plain."""
    target_YD = compression.target_YD
    whole_YY = target_YD @ moments.input_DD @ target_YD.mT
    mixed_YY = target_YD @ norm.cross_DR @ decoder_YR.mT
    error_YY = whole_YY - mixed_YY - mixed_YY.mT + decoder_YR @ norm.latent_RR @ decoder_YR.mT
    fisher_YY = moments.fisher([UNROTATED, VALUE], [UNROTATED, VALUE])
    weighted = _weighted(fisher_YY, error_YY) / max(_weighted(fisher_YY, whole_YY), 1e-300)
    return weighted, float(error_YY.trace() / whole_YY.trace().clamp(min=1e-300))


def portable_tensors(
    weights: Projections, compression: Compression, decoder_YR: Tensor, head_dim: int
) -> dict[str, Tensor]:
    """The tensors under `self_attn.` of a stock V3 block without query rank; o_proj stays the source's."""
    up_k_GdR, up_v_GdR = decoder_YR.view(2, -1, head_dim, decoder_YR.shape[-1])
    key_CD = to_complex(weights.key, head_dim)
    return _mla_tensors(
        q_nope_HND=weights.query.view(-1, head_dim, weights.query.shape[-1]),
        q_rope_HSD=_slot_queries(weights.query, compression.slot_decoder_CS, head_dim),
        down_WD=torch.cat([compression.encoder_RD, interleave(compression.slot_encoder_SC @ key_CD)]),
        gain_R=torch.ones_like(decoder_YR[0]),
        up_k_GNR=up_k_GdR,
        up_v_GdR=up_v_GdR,
        head_dim=head_dim,
    )


def exact_tensors(weights: Projections, head_dim: int, nope_dim: int) -> dict[str, Tensor]:
    """The same function in V3's form (design §2): every KV head's key has rope slots of its own, the latent is the
    values and one coordinate that a bias holds at `CONSTANT`, so that RMSNorm divides all tokens by the same number."""
    kv_channels, hidden = weights.key.shape
    kv_heads, rank = kv_channels // head_dim, kv_channels + 1
    zeros = weights.query.new_zeros
    slots_CC = torch.eye(kv_channels // 2, dtype=torch.complex128)
    tensors = _mla_tensors(
        q_nope_HND=zeros(len(weights.query) // head_dim, nope_dim, hidden),
        q_rope_HSD=_slot_queries(weights.query, slots_CC, head_dim),
        down_WD=torch.cat([weights.value, zeros(1, hidden), interleave(to_complex(weights.key, head_dim))]),
        gain_R=torch.full((rank,), CONSTANT / math.sqrt(rank), dtype=torch.float64),
        up_k_GNR=zeros(kv_heads, nope_dim, rank),
        up_v_GdR=torch.eye(kv_channels, rank, dtype=torch.float64).view(kv_heads, head_dim, rank),
        head_dim=head_dim,
    )
    bias_W = zeros(rank + kv_channels)
    bias_W[rank - 1] = CONSTANT
    return tensors | {"kv_a_proj_with_mqa.bias": bias_W, "o_proj.bias": zeros(hidden)}


def damping(moment: Tensor) -> Tensor:
    """Diagonal matrix with a little of the moment's own diagonal, enough to invert their sum whatever the scale."""
    diagonal = moment.diagonal().real
    return torch.diag_embed(_FISHER_DAMPING * diagonal + 1e-9 * diagonal.mean() + 1e-300).to(moment.dtype)


def roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """M^½ and M^-½ of a positive definite matrix."""
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp(min=float(values[-1]) * 1e-15)
    return (vectors * values.sqrt()) @ vectors.mH, (vectors * values.rsqrt()) @ vectors.mH


def _slot_queries(query_KD: Tensor, decoder_CS: Tensor, head_dim: int) -> Tensor:
    """Rope part of the queries (H, S, D), complex: the conjugate decoder of each head's KV group folded in."""
    query_HFD = to_complex(query_KD, head_dim).view(-1, head_dim // 2, query_KD.shape[-1])
    decoder_GFS = decoder_CS.view(-1, head_dim // 2, decoder_CS.shape[-1])
    decoder_HFS = decoder_GFS.repeat_interleave(len(query_HFD) // len(decoder_GFS), dim=0)
    return decoder_HFS.mH @ query_HFD


def _mla_tensors(
    *,
    q_nope_HND: Tensor,
    q_rope_HSD: Tensor,
    down_WD: Tensor,
    gain_R: Tensor,
    up_k_GNR: Tensor,
    up_v_GdR: Tensor,
    head_dim: int,
) -> dict[str, Tensor]:
    """Stock names and layout; the query takes up what V3's softmax scale, (nope + rope)^-½, differs by."""
    query = torch.cat([q_nope_HND, interleave(q_rope_HSD)], dim=1)
    up_GXR = torch.cat([up_k_GNR, up_v_GdR], dim=1)
    up_HXR = up_GXR.repeat_interleave(len(query) // len(up_GXR), dim=0)
    return {
        "q_proj.weight": query.flatten(0, 1) * math.sqrt(query.shape[1] / head_dim),
        "kv_a_proj_with_mqa.weight": down_WD,
        "kv_a_layernorm.weight": gain_R,
        "kv_b_proj.weight": up_HXR.flatten(0, 1),
    }


def _weighted(fisher: Tensor, moment: Tensor) -> float:
    """tr(F M), the expected squared first-order change of the log-likelihood."""
    return float((fisher * moment.mT).sum().real)

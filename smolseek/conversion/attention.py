"""Grouped-query attention to multi-head latent attention in closed form; pure functions on tensors (design §3).

Shapes: D hidden, E = D, or D + 1 where the source has biases (their column comes last, and inputs have a 1 there),
H query heads, G KV heads, d head_dim, K = G * d key (or value) channels, Y = 2K (keys, then values), C = K / 2 complex
key channels (head by head, d / 2 frequencies each), S rope slots (qk_rope_head_dim / 2), R latent rank, P query rank,
N qk_nope_head_dim, V v_head_dim, Q = N + 2S, X = H * Q, Z = (H + G) * d. The algebra is float64 and complex128.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from smolseek.conversion.moments import ROTATED, SLOT, UNROTATED, VALUE, LayerMoments, NormMoments

LATENT_RMS = 64.0
"""Scale of the latent before its norm: far above the eps that runtimes add (1e-6 or rms_norm_eps)."""
CONSTANT = 2.0**15
"""The exact form's constant coordinate: far above any value, within fp16."""

_FISHER_DAMPING = 1e-3
_REFIT_DAMPING = 1e-6
_FOLD_DAMPING = 1e-9


class Projections(NamedTuple):
    """The dense block's weights: query (H * d, E), key and value (K, E), output (D, H * d) and its bias (D,)."""

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    output_bias: Tensor | None = None


class HeadSizes(NamedTuple):
    """Widths of a head: the source's, and the target's qk_nope_head_dim and v_head_dim."""

    head_dim: int
    nope_dim: int
    v_dim: int


@dataclass(frozen=True)
class Heads:
    """One layer's heads in the target's sizes, V3's softmax scale taken up by the query."""

    query_XE: Tensor
    up_k_HNR: Tensor
    up_v_HVR: Tensor
    output_DHV: Tensor


class QueryLatent(NamedTuple):
    """Queries by way of a normalised latent: encoder (P, E) before the norm, decoder (X, P) behind it."""

    encoder_PE: Tensor
    decoder_XP: Tensor


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

    def silent(self) -> RopePlan:
        """The same slots with nothing in them, for a layer that rotates nothing."""
        return RopePlan(self.stride, ((),) * len(self.folds))


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
    stays unrotated. Slots beyond the source's frequencies stay silent.
    """
    if rope_dim > head_dim:
        extra = ((),) * ((rope_dim - head_dim) // 2)
        return [RopePlan(1, tuple((i,) for i in range(head_dim // 2)) + extra)]
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
        if not fold:
            continue
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
    # Any root will do, for another turns U alone; Cholesky's is the cheapest of them.
    weighted_YD = torch.linalg.cholesky(fisher_YY).mT @ target_YD
    values, vectors = torch.linalg.eigh(weighted_YD @ moments.input_DD @ weighted_YD.mT)
    values_R, u_YR = values[-rank:].flip(-1), vectors[:, -rank:].flip(-1)
    return _scaled(u_YR.mT @ weighted_YD, values_R, moments.input_DD)


def refit_decoder(target_YD: Tensor, norm: NormMoments) -> Tensor:
    """Decoder (Y, R) that minimises E|Y x - B n|² for the normalised latent n: B = Y E[x nᵀ] (E[n nᵀ] + λ)⁻¹.

    In place of a gain of E[rms] (design §2, the latent RMSNorm, 3); no weight on the error would change B.
    """
    return _regressed(target_YD @ norm.cross_DR, norm.latent_RR, _REFIT_DAMPING)


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


def fold_norms(weights: Projections, moments: LayerMoments) -> tuple[Projections, LayerMoments, float]:
    """The same without norms on every head's query and key: z = norm(W x) is nearly E[z xᵀ] E[x xᵀ]⁻¹ x.

    No linear map is nearer in E|z - W x|². The third is the share of E|z|² that is lost, of the queries or of the keys,
    whichever is more.
    """
    assert moments.heads_ZD is not None and moments.heads_energy_Z is not None
    made_ZE = _regressed(moments.heads_ZD, moments.input_DD, _FOLD_DAMPING)
    lost_Z = moments.heads_energy_Z + ((made_ZE @ moments.input_DD - 2 * moments.heads_ZD) * made_ZE).sum(-1)
    sizes = [len(weights.query), len(weights.key)]
    pairs = zip(lost_Z.split(sizes), moments.heads_energy_Z.split(sizes), strict=True)
    lost = max(float(part.sum() / whole.sum().clamp(min=1e-300)) for part, whole in pairs)
    query, key = made_ZE.split(sizes)
    plain = replace(moments, heads_ZD=None, heads_energy_Z=None)
    return weights._replace(query=query, key=key), plain, max(0.0, lost)


def fold_bias(weights: Projections, moments: LayerMoments) -> tuple[Projections, LayerMoments, float]:
    """The same without the column of biases: W x + b is nearly (W + b wᵀ) x where wᵀ x stays near 1.

    w = E[x xᵀ]⁻¹ E[x] minimises E(wᵀ x - 1)², the share of the biases' energy that is lost, given as the third.
    """
    hidden = len(weights.output)
    if weights.key.shape[1] == hidden:
        return weights, moments, 0.0
    input_DD, mean_D = moments.input_DD[:hidden, :hidden], moments.input_DD[:hidden, hidden]
    w_D = _regressed(mean_D[None], input_DD, _FOLD_DAMPING)[0]
    lost = 1 - 2 * mean_D @ w_D + w_D @ input_DD @ w_D
    query, key, value = (rows[:, :hidden] + torch.outer(rows[:, hidden], w_D) for rows in weights[:3])
    return Projections(query, key, value, *weights[3:]), replace(moments, input_DD=input_DD), float(lost)


def fit_heads(
    weights: Projections,
    compression: Compression,
    decoder_YR: Tensor,
    sizes: HeadSizes,
    input_EE: Tensor,
    latent_RR: Tensor,
) -> Heads:
    """The heads in the target's widths: wider ones end in zeros, narrower ones keep each head's best bilinear form.

    That is q_nopeᵀ up_k for the scores and output up_v for what a head adds, each weighed by the second moments of
    what stands on its sides (the inputs E[x xᵀ] and the normalised latent E[n nᵀ]).
    """
    head_dim = sizes.head_dim
    query_HdE = weights.query.view(-1, head_dim, weights.query.shape[-1])
    output_HdD = weights.output.T.reshape(len(query_HdE), head_dim, -1)
    up_k_HdR, up_v_HdR = (
        up.repeat_interleave(head_dim * len(query_HdE) // len(weights.key), dim=0)
        for up in decoder_YR.view(2, -1, head_dim, decoder_YR.shape[-1])
    )
    q_nope_HNE, up_k_HNR = resize_heads(query_HdE, up_k_HdR, input_EE, latent_RR, sizes.nope_dim)
    output_HVD, up_v_HVR = resize_heads(output_HdD, up_v_HdR, None, latent_RR, sizes.v_dim)
    q_rope_HSE = _slot_queries(weights.query, compression.slot_decoder_CS, head_dim)
    return Heads(_scaled_queries(q_nope_HNE, q_rope_HSE, head_dim), up_k_HNR, up_v_HVR, output_HVD.movedim(2, 0))


def resize_heads(
    left_HdX: Tensor, right_HdY: Tensor, left_XX: Tensor | None, right_YY: Tensor, width: int
) -> tuple[Tensor, Tensor]:
    """`width` rows of both in place of d, such that leftᵀ right stays, or the best that so few rows can give of it.

    Best in E|xᵀ leftᵀ right y|² where E[x xᵀ] = left_XX (None: the identity) and E[y yᵀ] = right_YY: with A and B the
    rows' second moments, the top of U S Vᵀ = A^½ B^½, left S^-½ Vᵀ B^½ and right S^-½ Uᵀ A^½.
    """
    head_dim = left_HdX.shape[1]
    if width >= head_dim:
        left, right = (F.pad(rows, (0, 0, 0, width - head_dim)) for rows in (left_HdX, right_HdY))
        return left, right
    left_Hdd = left_HdX @ (left_HdX if left_XX is None else left_HdX @ left_XX).mT
    roots_A, roots_B = (_batched_roots(m) for m in (left_Hdd, right_HdY @ right_YY @ right_HdY.mT))
    u_Hdd, s_Hd, v_Hdd = torch.linalg.svd(roots_A @ roots_B)
    kept_HN = s_Hd[:, :width]
    scale_HN1 = torch.where(kept_HN > 1e-10 * s_Hd[:, :1], kept_HN.rsqrt(), 0.0).unsqueeze(-1)
    left_HNX = scale_HN1 * (v_Hdd[:, :width] @ roots_B @ left_HdX)
    return left_HNX, scale_HN1 * (u_Hdd.mT[:, :width] @ roots_A @ right_HdY)


def query_encoder(
    heads: Heads, weights: Projections, compression: Compression, input_EE: Tensor, latent_RR: Tensor, rank: int
) -> Tensor:
    """Encoder (P, E) of the best rank-P stand-in for the queries, their error weighed by the keys that they meet.

    As `latent_encoder`, with F in one block a head: E[k kᵀ] of its unrotated keys, and each slot's mean energy for both
    numbers that it turns. Decomposed on the inputs' side, Σ^½ Yᵀ F Y Σ^½, the smaller one: rows S⁻¹ Vᵀ Σ^½ Yᵀ F Y.
    """
    query_HQE = heads.query_XE.view(len(heads.up_k_HNR), -1, heads.query_XE.shape[-1])
    nope_dim = heads.up_k_HNR.shape[1]
    nope_HNN = heads.up_k_HNR @ latent_RR @ heads.up_k_HNR.mT
    head_dim = len(weights.query) // len(query_HQE)
    slots_SE = compression.slot_encoder_SC @ to_complex(weights.key, head_dim)
    energy_S = ((slots_SE @ input_EE.to(slots_SE.dtype)) * slots_SE.conj()).sum(-1).real / 2
    nope_HNE, rope_HUE = query_HQE[:, :nope_dim], query_HQE[:, nope_dim:]
    weighed = torch.cat([nope_HNN @ nope_HNE, energy_S.repeat_interleave(2)[:, None] * rope_HUE], dim=1)
    form_EE = heads.query_XE.mT @ weighed.flatten(0, 1)
    root_EE = _batched_roots(input_EE)
    values, vectors = torch.linalg.eigh(root_EE @ form_EE @ root_EE)
    values_P, v_EP = values[-rank:].flip(-1), vectors[:, -rank:].flip(-1)
    norms_P = values_P.clamp(min=float(values_P[0]) * 1e-12 + 1e-300)
    return _scaled(v_EP.mT @ root_EE @ form_EE / norms_P.sqrt()[:, None], values_P, input_EE)


def portable_tensors(
    weights: Projections, compression: Compression, heads: Heads, head_dim: int, query: QueryLatent | None = None
) -> dict[str, Tensor]:
    """The tensors under `self_attn.` of a stock V3 block, with biases where the weights have their column."""
    key_CE = to_complex(weights.key, head_dim)
    return _mla_tensors(
        weights,
        heads,
        down_WE=torch.cat([compression.encoder_RD, interleave(compression.slot_encoder_SC @ key_CE)]),
        gain_R=torch.ones_like(compression.encoder_RD[:, 0]),
        query=query,
    )


def exact_query(query_XE: Tensor, gain_D: Tensor, rank: int) -> QueryLatent | None:
    """A query latent that loses nothing (design §2, the latent RMSNorm), or None where the rank is too small for one.

    With biases one coordinate is held at `CONSTANT`. Without, the input's own norm is undone (`gain_D` is its gain):
    the latent then has the same root mean square at every token, up to that norm's eps; a gain of 0 allows none.
    """
    hidden, columns = len(gain_D), query_XE.shape[1]
    if rank != columns or (columns == hidden and gain_D.abs().min() < 1e-6 * gain_D.abs().max()):
        return None
    if columns > hidden:
        scale_E = torch.ones_like(query_XE[0])
        scale_E[hidden] = CONSTANT
        return QueryLatent(torch.diag(scale_E), query_XE / scale_E * (CONSTANT / math.sqrt(rank)))
    return QueryLatent(torch.diag(LATENT_RMS / gain_D), query_XE * gain_D)


def exact_tensors(weights: Projections, head_dim: int, nope_dim: int, *, rotates: bool = True) -> dict[str, Tensor]:
    """The same function in V3's form (design §2): every KV head's key has rope slots of its own, the latent is the
    values and one coordinate that a bias holds at `CONSTANT`, so that RMSNorm divides all tokens by the same number.

    With a `nope_dim` (the head's width) the latent has room for unrotated keys as well, taken where the layer does not
    rotate. Biases of the queries go through a latent query with a constant coordinate of its own.
    """
    hidden, biased = len(weights.output), weights.key.shape[1] > len(weights.output)
    query, key, value = (rows if biased else _with_column(rows) for rows in weights[:3])
    channels, heads = len(key), len(query) // head_dim
    zeros, eye = query.new_zeros, torch.eye(len(key), dtype=query.dtype)
    constant_1E = zeros(1, hidden + 1)
    constant_1E[0, hidden] = CONSTANT
    latent_keys = [zeros(channels, hidden + 1) if rotates else key] if nope_dim else []
    rope_keys = interleave(to_complex(key, head_dim)) if rotates else zeros(channels, hidden + 1)
    down_WE = torch.cat([value, *latent_keys, constant_1E, rope_keys])
    rank = len(down_WE) - channels

    up_KR = F.pad(eye, (channels, rank - 2 * channels)) if nope_dim and not rotates else None
    up_k = zeros(channels // head_dim, nope_dim, rank) if up_KR is None else up_KR.view(-1, head_dim, rank)
    up_v = F.pad(eye, (0, rank - channels)).view(-1, head_dim, rank)
    repeats = heads * head_dim // channels
    slots_CC = torch.eye(channels // 2, dtype=torch.complex128)
    q_nope = zeros(heads, nope_dim, hidden + 1) if up_KR is None else query.view(heads, head_dim, -1)
    q_rope = _slot_queries(query, slots_CC if rotates else 0 * slots_CC, head_dim)
    query_XE = _scaled_queries(q_nope, q_rope, head_dim)
    made = Heads(
        query_XE if biased else query_XE[:, :hidden],
        up_k.repeat_interleave(repeats, dim=0),
        up_v.repeat_interleave(repeats, dim=0),
        weights.output.view(hidden, heads, head_dim),
    )
    latent = exact_query(query_XE, zeros(hidden), hidden + 1) if biased else None
    gain_R = torch.full((rank,), CONSTANT / math.sqrt(rank), dtype=query.dtype)
    gain_R[-1] = 0.0  # behind the norm nothing may read the constant, or the first step of training would
    return _mla_tensors(weights, made, down_WE=down_WE, gain_R=gain_R, query=latent)


def damping(moment: Tensor) -> Tensor:
    """Diagonal matrix with a little of the moment's own diagonal, enough to invert their sum whatever the scale."""
    diagonal = moment.diagonal().real
    return torch.diag_embed(_FISHER_DAMPING * diagonal + 1e-9 * diagonal.mean() + 1e-300).to(moment.dtype)


def roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """M^½ and M^-½ of a positive definite matrix."""
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp(min=float(values[-1]) * 1e-15)
    return (vectors * values.sqrt()) @ vectors.mH, (vectors * values.rsqrt()) @ vectors.mH


def _regressed(cross_YX: Tensor, moment_XX: Tensor, share: float) -> Tensor:
    """E[y xᵀ] (E[x xᵀ] + λ)⁻¹, λ that share of the mean energy: the map of x nearest to y."""
    energy = float(moment_XX.diagonal().mean())
    damped_XX = moment_XX + share * energy * torch.eye(len(moment_XX), dtype=moment_XX.dtype)
    return torch.linalg.solve(damped_XX, cross_YX.mT).mT


def _slot_queries(query_KD: Tensor, decoder_CS: Tensor, head_dim: int) -> Tensor:
    """Rope part of the queries (H, S, D), complex: the conjugate decoder of each head's KV group folded in."""
    query_HFD = to_complex(query_KD, head_dim).view(-1, head_dim // 2, query_KD.shape[-1])
    decoder_GFS = decoder_CS.view(-1, head_dim // 2, decoder_CS.shape[-1])
    decoder_HFS = decoder_GFS.repeat_interleave(len(query_HFD) // len(decoder_GFS), dim=0)
    return decoder_HFS.mH @ query_HFD


def _scaled_queries(q_nope_HNE: Tensor, q_rope_HSE: Tensor, head_dim: int) -> Tensor:
    """Queries (X, E) in V3's layout; they take up what its softmax scale, (nope + rope)^-½, differs by."""
    query_HQE = torch.cat([q_nope_HNE, interleave(q_rope_HSE)], dim=1)
    return query_HQE.flatten(0, 1) * math.sqrt(query_HQE.shape[1] / head_dim)


def _mla_tensors(
    weights: Projections, heads: Heads, *, down_WE: Tensor, gain_R: Tensor, query: QueryLatent | None
) -> dict[str, Tensor]:
    """Stock names and layout; a last column beyond the hidden size is a bias."""
    hidden = len(weights.output)
    tensors = {}
    if query is None:
        tensors["q_proj.weight"] = heads.query_XE
    else:
        tensors |= _linear("q_a_proj", query.encoder_PE, hidden)
        tensors["q_a_layernorm.weight"] = torch.ones_like(query.encoder_PE[:, 0])
        tensors["q_b_proj.weight"] = query.decoder_XP
    tensors |= _linear("kv_a_proj_with_mqa", down_WE, hidden)
    tensors["kv_a_layernorm.weight"] = gain_R
    tensors["kv_b_proj.weight"] = torch.cat([heads.up_k_HNR, heads.up_v_HVR], dim=1).flatten(0, 1)
    tensors["o_proj.weight"] = heads.output_DHV.flatten(1)
    if down_WE.shape[1] > hidden:
        bias_D = weights.output_bias
        tensors["o_proj.bias"] = down_WE.new_zeros(hidden) if bias_D is None else bias_D
    return tensors


def _linear(name: str, rows_XE: Tensor, hidden: int) -> dict[str, Tensor]:
    """Weight and, where there is a column for it, bias."""
    bias = {f"{name}.bias": rows_XE[:, hidden]} if rows_XE.shape[1] > hidden else {}
    return {f"{name}.weight": rows_XE[:, :hidden]} | bias


def _with_column(rows_XD: Tensor) -> Tensor:
    return F.pad(rows_XD, (0, 1))


def _batched_roots(moment_Hdd: Tensor) -> Tensor:
    """M^½ of each of a batch of positive semidefinite matrices."""
    values, vectors = torch.linalg.eigh(moment_Hdd)
    return (vectors * values.clamp(min=0).sqrt().unsqueeze(-2)) @ vectors.mT


def _scaled(rows_RE: Tensor, values_R: Tensor, input_EE: Tensor) -> Tensor:
    """Encoder rows, each times λ^-¼, together at a root mean square of `LATENT_RMS`."""
    encoder_RE = values_R.clamp(min=float(values_R[0]) * 1e-12 + 1e-300)[:, None] ** -0.25 * rows_RE
    mean_square = float(((encoder_RE @ input_EE) * encoder_RE).sum()) / len(encoder_RE)
    return encoder_RE * (LATENT_RMS / math.sqrt(max(mean_square, 1e-300)))


def _weighted(fisher: Tensor, moment: Tensor) -> float:
    """tr(F M), the expected squared first-order change of the log-likelihood."""
    return float((fisher * moment.mT).sum().real)

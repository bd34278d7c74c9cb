"""Grouped-query attention to multi-head latent attention in closed form; pure functions on tensors (design §3).

Shapes: D hidden, H query heads, G KV heads, d head_dim, C = G * d / 2 complex key channels (head by head), S rope
slots (qk_rope_head_dim / 2), R latent rank, Y = 2 * G * d (keys, then values). All algebra is float64 or complex128.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from smolseek.conversion.moments import LayerMoments, NormMoments

_LATENT_RMS = 64.0  # far above both eps that runtimes add (1e-6, rms_norm_eps), far below the largest fp16 number
_FISHER_DAMPING = 1e-3
_REFIT_DAMPING = 1e-6


@dataclass(frozen=True)
class RopePlan:
    """Which source frequencies each rope slot folds together, and the target's rope_theta that gives their angles."""

    rope_theta: float
    folds: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class LayerShape:
    """Head counts of a layer and its rope width."""

    heads: int
    kv_heads: int
    head_dim: int
    rope_dim: int


def rope_plans(head_dim: int, rope_dim: int, rope_theta: float) -> list[RopePlan]:
    """Ways to place rope_dim/2 slots on head_dim/2 frequencies, the fastest slots first.

    With stride s slot j turns exactly like source frequency s*j (rope_theta ** (s * rope_dim / head_dim)) and folds in
    the s - 1 slower neighbours; what lies beyond the last slot stays unrotated.
    """
    slots, widest = rope_dim // 2, head_dim // rope_dim
    strides = [2**power for power in range(widest.bit_length()) if 2**power < widest] + [widest]
    return [
        RopePlan(
            rope_theta ** (stride * rope_dim / head_dim),
            tuple(tuple(range(stride * slot, stride * (slot + 1))) for slot in range(slots)),
        )
        for stride in strides
    ]


def to_complex(weight_KD: Tensor, head_dim: int) -> Tensor:
    """Rows (heads * d, D) as complex channels (heads * d/2, D): κ_i = k_i + j k_{i+d/2}, the pairs that Llama rotates."""
    first, second = weight_KD.view(-1, 2, head_dim // 2, weight_KD.shape[-1]).unbind(1)
    return torch.complex(first, second).flatten(0, 1)


def to_real(weight_CD: Tensor, head_dim: int) -> Tensor:
    """Inverse of `to_complex`."""
    halves = weight_CD.view(-1, head_dim // 2, weight_CD.shape[-1])
    return torch.cat([halves.real, halves.imag], dim=1).flatten(0, 1)


def complex_moment(moment_KK: Tensor, head_dim: int) -> Tensor:
    """E[κ κᴴ] (C, C) from E[k kᵀ] (heads * d, heads * d)."""
    heads = len(moment_KK) // head_dim
    blocks = moment_KK.view(heads, 2, head_dim // 2, heads, 2, head_dim // 2)
    real = blocks[:, 0, :, :, 0] + blocks[:, 1, :, :, 1]
    imaginary = blocks[:, 1, :, :, 0] - blocks[:, 0, :, :, 1]
    return torch.complex(real, imaginary).reshape(heads * head_dim // 2, -1)


def damped_roots(moment: Tensor, damping: float = _FISHER_DAMPING) -> tuple[Tensor, Tensor]:
    """M^½ and M^-½ of a positive semi-definite matrix with `damping` times its mean diagonal added."""
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp(min=0)
    values = values + damping * values.mean() + torch.finfo(values.dtype).tiny
    return (vectors * values.sqrt()) @ vectors.mH, (vectors * values.rsqrt()) @ vectors.mH


def rope_slots(key_CC: Tensor, fisher_CC: Tensor, plan: RopePlan, head_dim: int) -> tuple[Tensor, Tensor]:
    """Encoder (S, C) and decoder (C, S) of the one complex channel that each slot keeps.

    Per slot, u is the top eigenvector of F^½ K F^½ over the channels (KV head, frequency in the fold); encode uᴴ F^½,
    decode F^-½ u, scaled so that the decoder has unit norm (design §3, step 2). Mixing heads of one frequency commutes
    with the rotation; folding neighbouring frequencies is an approximation.
    """
    channels_GF = torch.arange(len(key_CC)).view(-1, head_dim // 2)
    encoder_SC = key_CC.new_zeros(len(plan.folds), len(key_CC))
    decoder_CS = key_CC.new_zeros(len(key_CC), len(plan.folds))
    for slot, fold in enumerate(plan.folds):
        picked = channels_GF[:, list(fold)].flatten()
        root, inverse_root = damped_roots(fisher_CC[picked][:, picked])
        u = torch.linalg.eigh(root @ key_CC[picked][:, picked] @ root).eigenvectors[:, -1]
        decode = inverse_root @ u
        scale = decode.norm()
        encoder_SC[slot, picked] = (u.conj() @ root) * scale
        decoder_CS[picked, slot] = decode / scale
    return encoder_SC, decoder_CS


def interleave(rows_SD: Tensor) -> Tensor:
    """Complex rows (S, D) as the real rows (2S, D) that V3 rotates: (2i, 2i+1) are real and imaginary part."""
    return torch.view_as_real(rows_SD).movedim(-1, 1).flatten(0, 1)


def latent_encoder(target_YD: Tensor, moments: LayerMoments, rank: int) -> tuple[Tensor, Tensor]:
    """Encoder (R, D) and decoder (Y, R) of the best rank-R stand-in for `target` under the Fisher weight.

    U holds the top R eigenvectors of F^½ Y Σ Yᵀ F^½; encode Uᵀ F^½ Y, decode F^-½ U (design §3, step 3). The encoder
    is scaled to an rms of 64, because RMSNorm adds eps to the mean square.
    """
    root, inverse_root = damped_roots(moments.fisher_YY)
    weighted_YD = root @ target_YD
    u_YR = torch.linalg.eigh(weighted_YD @ moments.input_DD @ weighted_YD.mT).eigenvectors[:, -rank:].flip(-1)
    encoder_RD = u_YR.mT @ weighted_YD
    mean_square = torch.einsum("rd,de,re->", encoder_RD, moments.input_DD, encoder_RD) / rank
    scale = _LATENT_RMS / mean_square.clamp(min=torch.finfo(torch.float64).tiny).sqrt()
    return encoder_RD * scale, inverse_root @ u_YR / scale


def refit_decoder(target_YD: Tensor, norm: NormMoments) -> Tensor:
    """Decoder (Y, R) that minimises E|Y x - B n|² for the normalised latent n: Y E[x nᵀ] (E[n nᵀ] + λ)⁻¹."""
    diagonal = norm.latent_RR.diagonal()
    damped_RR = norm.latent_RR + torch.diag_embed(torch.full_like(diagonal, _REFIT_DAMPING * float(diagonal.mean())))
    return torch.linalg.solve(damped_RR, (target_YD @ norm.cross_DR).mT).mT

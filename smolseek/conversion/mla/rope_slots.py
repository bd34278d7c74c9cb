"""Rope slots: the one rotated key that all heads share, and how the source's rotated keys go into it.

Llama turns the channels (i, i + d / 2) of a head at frequency i: as one complex channel it is multiplied by e^{jθ}.
A slot of the target keeps one complex channel. Mixing the KV heads' channels of one frequency commutes with the
rotation, so a slot can serve all heads.

Shapes: D hidden_size, X entries of the block's input, H num_attention_heads, G num_key_value_heads, d head_dim,
F = d / 2 rotary frequencies, k = G × d key channels, c = k / 2 complex key channels, s = R / 2 rope slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smolseek.conversion.mla.algebra import damping, inverse_root
from smolseek.conversion.mla.plans import RopePlan


def to_complex(rows_kX: Tensor, head_dim: int) -> Tensor:
    """Returns rows (heads * d, X) as complex channels (heads * d / 2, X): κ_i = k_i + j k_{i+d/2}."""
    first, second = rows_kX.view(-1, 2, head_dim // 2, rows_kX.shape[-1]).unbind(1)
    return torch.complex(first, second).flatten(0, 1)


def to_real(rows_cX: Tensor, head_dim: int) -> Tensor:
    """Returns the inverse of `to_complex`."""
    heads = rows_cX.view(-1, head_dim // 2, rows_cX.shape[-1])
    return torch.cat([heads.real, heads.imag], dim=1).flatten(0, 1)


def complex_moment(moment_kk: Tensor, head_dim: int) -> Tensor:
    """Returns E[κ λᴴ] (c, c) from E[k lᵀ] (k, k)."""
    half = head_dim // 2
    blocks = moment_kk.reshape(len(moment_kk) // head_dim, 2, half, -1, 2, half)
    real = blocks[:, 0, :, :, 0] + blocks[:, 1, :, :, 1]
    imaginary = blocks[:, 1, :, :, 0] - blocks[:, 0, :, :, 1]
    return torch.complex(real, imaginary).reshape(len(moment_kk) // 2, -1)


def interleave(rows_sX: Tensor) -> Tensor:
    """Returns complex rows (..., s, X) as the real rows (..., 2 s, X) that V3 turns: real and imaginary in turn."""
    return torch.view_as_real(rows_sX).movedim(-1, -2).flatten(-3, -2)


def fit_rope_slots(
    energy_cc: Tensor, slot_cc: Tensor, cross_cc: Tensor, plan: RopePlan, head_dim: int
) -> tuple[Tensor, Tensor]:
    """Returns encoder (s, c) and decoder (c, s) of the one complex channel that each slot keeps.

    A slot sees the channels (KV head, frequency in its fold), with key covariance K and Fisher F at the slot's
    frequency. u is the top left singular vector of F^½ M K^½ with M = F⁻¹ E[g_slot g_sourceᴴ]; the encoder is
    uᴴ F^½ M, the decoder F^-½ u at unit norm. Without a fold M = 1. Folded neighbouring frequencies do not commute
    with the rotation, which M accounts for (docs/method.md, "Rope slots").
    """
    channels_GF = torch.arange(len(energy_cc), device=energy_cc.device).view(-1, head_dim // 2)
    encoder_sc = energy_cc.new_zeros(len(plan.folds), len(energy_cc))
    decoder_cs = energy_cc.new_zeros(len(energy_cc), len(plan.folds))
    for slot, fold in enumerate(plan.folds):
        if not fold:
            continue
        picked = channels_GF[:, fold[0] : fold[-1] + 1].flatten()
        energy, fisher, cross = (
            m.index_select(0, picked).index_select(1, picked) for m in (energy_cc, slot_cc, cross_cc)
        )
        extra = damping(fisher)
        fisher_inverse_root = inverse_root(fisher + extra)
        seen = fisher_inverse_root @ (cross + extra)  # F^½ M
        u = torch.linalg.eigh(seen @ energy @ seen.mH).eigenvectors[:, -1]
        decode = fisher_inverse_root @ u
        encoder_sc[slot].index_copy_(0, picked, (u.conj() @ seen) * decode.norm())
        decoder_cs[:, slot].index_copy_(0, picked, decode / decode.norm())
    return encoder_sc, decoder_cs


def rotated_queries(query_kX: Tensor, decoder_cs: Tensor, head_dim: int) -> Tensor:
    """Returns the rotated part of the queries (H, s, X), complex: the conjugate decoder of each head's KV group."""
    query_HFX = to_complex(query_kX, head_dim).view(-1, head_dim // 2, query_kX.shape[-1])
    decoder_GFs = decoder_cs.view(-1, head_dim // 2, decoder_cs.shape[-1])
    decoder_HFs = decoder_GFs.repeat_interleave(len(query_HFX) // len(decoder_GFs), dim=0)
    return decoder_HFs.mH @ query_HFX

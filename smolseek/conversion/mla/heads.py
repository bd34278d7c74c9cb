"""Heads in the target's widths, and queries by way of a latent.

Shapes: D hidden_size, X entries of the block's input, H num_attention_heads, d head_dim, Y rows of keys and values,
s = R / 2 rope slots, C kv_lora_rank, q q_lora_rank, U qk_nope_head_dim, v v_head_dim, Q = U + R; O and A the two sides
of a bilinear form.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from smolseek.conversion.mla.algebra import root
from smolseek.conversion.mla.latent import LATENT_RMS, Compression, Latent, scale_encoder
from smolseek.conversion.mla.rope_slots import interleave, rotated_queries, to_complex
from smolseek.conversion.mla.weights import HeadSizes, Projections

CONSTANT = 2.0**15
"""The constant coordinate of a latent: far above any other value, within fp16."""


@dataclass(frozen=True)
class Heads:
    """One layer's heads in the target's sizes; the query makes up for V3's softmax scale."""

    query_HQX: Tensor
    up_k_HUC: Tensor
    up_v_HvC: Tensor
    output_DHv: Tensor


class QueryLatent(NamedTuple):
    """Queries by way of a normalised latent: encoder (q, X) before the norm, decoder (H · Q, q) behind it."""

    encoder_qX: Tensor
    decoder: Tensor


def fit_heads(
    weights: Projections,
    compression: Compression,
    latent: Latent,
    sizes: HeadSizes,
    input_XX: Tensor,
) -> Heads:
    """Returns the heads in the target's widths: wider ones end in zeros, narrower ones keep the best bilinear forms.

    The forms are q_nopeᵀ up_k for the scores and output up_v for what a head adds. Each is weighed by the second
    moments of what stands on its sides: the inputs E[x xᵀ] and the normalised latent E[n nᵀ].
    """
    head_dim = sizes.head_dim
    query_HdX = weights.query.view(-1, head_dim, weights.query.shape[-1])
    output_HdD = weights.output.T.reshape(len(query_HdX), head_dim, -1)
    up_k_HdC, up_v_HdC = (
        up.repeat_interleave(head_dim * len(query_HdX) // len(weights.key), dim=0)
        for up in latent.decoder_YC.view(2, -1, head_dim, len(latent.normed_CC))
    )
    q_nope_HUX, up_k_HUC = resize_heads(query_HdX, up_k_HdC, input_XX, latent.normed_CC, sizes.nope_dim)
    output_HvD, up_v_HvC = resize_heads(output_HdD, up_v_HdC, None, latent.normed_CC, sizes.v_dim)
    q_rope_HsX = rotated_queries(weights.query, compression.slot_decoder_cs, head_dim)
    return Heads(scale_queries(q_nope_HUX, q_rope_HsX, head_dim), up_k_HUC, up_v_HvC, output_HvD.movedim(2, 0))


def resize_heads(
    left_HdO: Tensor, right_HdA: Tensor, left_OO: Tensor | None, right_AA: Tensor, width: int
) -> tuple[Tensor, Tensor]:
    """Returns `width` rows of both sides in place of d, so that leftᵀ right stays as it is or as near as it can be.

    Near in E|xᵀ leftᵀ right y|² where E[x xᵀ] = left_OO (None: the identity) and E[y yᵀ] = right_AA. With A and B the
    rows' second moments and U S Vᵀ the top of A^½ B^½, that is left S^-½ Vᵀ B^½ and right S^-½ Uᵀ A^½.
    """
    head_dim = left_HdO.shape[1]
    if width >= head_dim:
        left, right = (F.pad(rows, (0, 0, 0, width - head_dim)) for rows in (left_HdO, right_HdA))
        return left, right
    left_Hdd = left_HdO @ (left_HdO if left_OO is None else left_HdO @ left_OO).mT
    root_A, root_B = (root(m) for m in (left_Hdd, right_HdA @ right_AA @ right_HdA.mT))
    u_Hdd, s_Hd, v_Hdd = torch.linalg.svd(root_A @ root_B)
    kept = s_Hd[:, :width]
    scale = torch.where(kept > 1e-10 * s_Hd[:, :1], kept.rsqrt(), 0.0).unsqueeze(-1)
    return scale * (v_Hdd[:, :width] @ root_B @ left_HdO), scale * (u_Hdd.mT[:, :width] @ root_A @ right_HdA)


def scale_queries(q_nope_HUX: Tensor, q_rope_HsX: Tensor, head_dim: int) -> Tensor:
    """Returns queries (H, Q, X) in V3's layout, scaled by what V3's softmax scale Q^-½ differs from d^-½."""
    query_HQX = torch.cat([q_nope_HUX, interleave(q_rope_HsX)], dim=1)
    return query_HQX * math.sqrt(query_HQX.shape[1] / head_dim)


def query_encoder(
    heads: Heads, weights: Projections, compression: Compression, latent_CC: Tensor, input_XX: Tensor, rank: int
) -> Tensor:
    """Returns the encoder (q, X) of the best rank-q stand-in for the queries, weighed by the keys that they meet.

    As in `latent.Compression.encode`, but F has one block a head: E[k kᵀ] of its unrotated keys, and each slot's mean
    energy for both numbers that it turns. The decomposition is of the smaller side, Σ^½ Yᵀ F Y Σ^½, so the rows are
    S⁻¹ Vᵀ Σ^½ Yᵀ F Y.
    """
    query_HQX, nope_dim = heads.query_HQX, heads.up_k_HUC.shape[1]
    nope_HUU = heads.up_k_HUC @ latent_CC @ heads.up_k_HUC.mT
    head_dim = len(weights.query) // len(query_HQX)
    slots_sX = compression.slot_encoder_sc @ to_complex(weights.key, head_dim)
    energy_s = ((slots_sX @ input_XX.to(slots_sX.dtype)) * slots_sX.conj()).sum(-1).real / 2
    nope_HUX, rope_HRX = query_HQX[:, :nope_dim], query_HQX[:, nope_dim:]
    weighed_HQX = torch.cat([nope_HUU @ nope_HUX, energy_s.repeat_interleave(2)[:, None] * rope_HRX], dim=1)
    form_XX = query_HQX.flatten(0, 1).mT @ weighed_HQX.flatten(0, 1)
    root_XX = root(input_XX)
    values, vectors = torch.linalg.eigh(root_XX @ form_XX @ root_XX)
    values_q, v_Xq = values[-rank:].flip(-1), vectors[:, -rank:].flip(-1)
    norms_q = values_q.clamp(min=values_q[:1] * 1e-12 + 1e-300)
    return scale_encoder(v_Xq.mT @ root_XX @ form_XX / norms_q.sqrt()[:, None], values_q, input_XX)


def exact_query(query_HQX: Tensor, gain_D: Tensor, rank: int) -> QueryLatent | None:
    """Returns a query latent that loses nothing, or None where the rank is too small for one.

    With biases one coordinate is held at `CONSTANT`. Without, the input's own norm is undone (`gain_D` is its gain):
    the latent then has the same root mean square at every token, up to that norm's eps. A gain of 0 allows none.
    """
    hidden, query = len(gain_D), query_HQX.flatten(0, 1)
    columns = query.shape[1]
    if rank != columns or (columns == hidden and bool(gain_D.abs().min() < 1e-6 * gain_D.abs().max())):
        return None
    if columns > hidden:
        scale_X = torch.ones_like(query[0])
        scale_X[hidden] = CONSTANT
        return QueryLatent(torch.diag(scale_X), query / scale_X * (CONSTANT / math.sqrt(rank)))
    return QueryLatent(torch.diag(LATENT_RMS / gain_D), query * gain_D)

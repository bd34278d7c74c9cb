"""Converted attention under stock names and in stock layout.

Shapes: D hidden_size, X entries of the block's input (the last one is a constant where X = D + 1), C kv_lora_rank,
W = C + R, c complex key channels, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smolseek.conversion.mla.heads import Heads, QueryLatent
from smolseek.conversion.mla.latent import Compression, Latent
from smolseek.conversion.mla.rope_slots import interleave, to_complex
from smolseek.conversion.mla.weights import Projections


def low_rank_tensors(
    weights: Projections,
    compression: Compression,
    latent: Latent,
    heads: Heads,
    head_dim: int,
    query: QueryLatent | None = None,
) -> dict[str, Tensor]:
    """Returns the tensors under `self_attn.` of the low-rank form, with biases where the weights have their column."""
    key_cX = to_complex(weights.key, head_dim)
    return mla_tensors(
        weights,
        heads,
        down_WX=torch.cat([latent.encoder_CX, interleave(compression.slot_encoder_sc @ key_cX)]),
        gain_C=torch.ones_like(latent.encoder_CX[:, 0]),
        query=query,
    )


def mla_tensors(
    weights: Projections, heads: Heads, *, down_WX: Tensor, gain_C: Tensor, query: QueryLatent | None
) -> dict[str, Tensor]:
    """Returns the tensors under `self_attn.`; a last column beyond the hidden size becomes a bias."""
    hidden = len(weights.output)
    tensors = {}
    if query is None:
        tensors["q_proj.weight"] = heads.query_HQX.flatten(0, 1)
    else:
        tensors |= _linear("q_a_proj", query.encoder_qX, hidden)
        tensors["q_a_layernorm.weight"] = torch.ones_like(query.encoder_qX[:, 0])
        tensors["q_b_proj.weight"] = query.decoder
    tensors |= _linear("kv_a_proj_with_mqa", down_WX, hidden)
    tensors["kv_a_layernorm.weight"] = gain_C
    tensors["kv_b_proj.weight"] = torch.cat([heads.up_k_HUC, heads.up_v_HvC], dim=1).flatten(0, 1)
    tensors["o_proj.weight"] = heads.output_DHv.flatten(1)
    if down_WX.shape[1] > hidden:
        bias_D = weights.output_bias
        tensors["o_proj.bias"] = down_WX.new_zeros(hidden) if bias_D is None else bias_D
    return tensors


def _linear(name: str, rows_OX: Tensor, hidden: int) -> dict[str, Tensor]:
    """Returns weight and, where there is a column for it, bias."""
    bias = {f"{name}.bias": rows_OX[:, hidden]} if rows_OX.shape[1] > hidden else {}
    return {f"{name}.weight": rows_OX[:, :hidden]} | bias

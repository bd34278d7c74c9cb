"""The exact form: the dense block's own function in V3's layout (docs/method.md, "Exact conversion").

Shapes: D hidden_size, X = D + 1 (the last entry is the constant 1), H num_attention_heads, G num_key_value_heads,
d head_dim, k = G × d key channels, c = k / 2 complex key channels, C kv_lora_rank, W = C + R, U qk_nope_head_dim.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from smolseek.conversion.mla.heads import CONSTANT, Heads, exact_query, scale_queries
from smolseek.conversion.mla.layout import mla_tensors
from smolseek.conversion.mla.rope_slots import interleave, rotated_queries, to_complex
from smolseek.conversion.mla.weights import Projections


def exact_tensors(weights: Projections, head_dim: int, nope_dim: int, *, rotates: bool = True) -> dict[str, Tensor]:
    """Returns the tensors under `self_attn.` of a V3 block that computes the same function.

    Every KV head's key has rope slots of its own. The latent holds the values and one coordinate that a bias keeps at
    `CONSTANT`, so that RMSNorm divides all tokens by the same number. With a `nope_dim` (the head's width) the latent
    has room for unrotated keys as well, used where the layer does not rotate. Biases of the queries go through a latent
    query with a constant coordinate of its own.
    """
    hidden, biased = len(weights.output), weights.key.shape[1] > len(weights.output)
    query, key, value = (rows if biased else F.pad(rows, (0, 1)) for rows in weights[:3])
    channels, heads = len(key), len(query) // head_dim
    zeros, eye_kk = query.new_zeros, torch.eye(len(key), dtype=query.dtype, device=query.device)
    constant_1X = zeros(1, hidden + 1)
    constant_1X[0, hidden] = CONSTANT
    latent_keys = [zeros(channels, hidden + 1) if rotates else key] if nope_dim else []
    rope_keys = interleave(to_complex(key, head_dim)) if rotates else zeros(channels, hidden + 1)
    down_WX = torch.cat([value, *latent_keys, constant_1X, rope_keys])
    rank = len(down_WX) - channels

    up_kC = F.pad(eye_kk, (channels, rank - 2 * channels)) if nope_dim and not rotates else None
    up_k_GUC = zeros(channels // head_dim, nope_dim, rank) if up_kC is None else up_kC.view(-1, head_dim, rank)
    up_v_GvC = F.pad(eye_kk, (0, rank - channels)).view(-1, head_dim, rank)
    repeats = heads * head_dim // channels
    slots_cc = torch.eye(channels // 2, dtype=torch.complex128, device=query.device)
    q_nope_HUX = zeros(heads, nope_dim, hidden + 1) if up_kC is None else query.view(heads, head_dim, -1)
    q_rope_HsX = rotated_queries(query, slots_cc if rotates else 0 * slots_cc, head_dim)
    query_HQX = scale_queries(q_nope_HUX, q_rope_HsX, head_dim)
    made = Heads(
        query_HQX if biased else query_HQX[..., :hidden],
        up_k_GUC.repeat_interleave(repeats, dim=0),
        up_v_GvC.repeat_interleave(repeats, dim=0),
        weights.output.view(hidden, heads, head_dim),
    )
    latent = exact_query(query_HQX, zeros(hidden), hidden + 1) if biased else None
    gain_C = torch.full((rank,), CONSTANT / math.sqrt(rank), dtype=query.dtype, device=query.device)
    gain_C[-1] = 0.0  # gain 0 hides the constant, so training cannot start to use it
    return mla_tensors(weights, made, down_WX=down_WX, gain_C=gain_C, query=latent)

"""Random attention blocks, dense attention and V3's attention, written out plainly in float64.

A `shape` that hypothesis draws is (KV heads, heads of each, head_dim, seed).
"""

import math

import torch
from hypothesis import settings
from hypothesis import strategies as st

from smolseek.conversion.mla.heads import fit_heads
from smolseek.conversion.mla.latent import Latent
from smolseek.conversion.mla.layout import low_rank_tensors
from smolseek.conversion.mla.weights import HeadSizes, Projections
from smolseek.conversion.moments import LayerMoments
from smolseek.conversion.probe import rotate_by_angles

quick = settings(max_examples=8, deadline=None)
shapes = st.tuples(st.sampled_from([1, 2, 3]), st.sampled_from([1, 2]), st.sampled_from([4, 8]), st.integers(0, 10**6))


def random_layer(kv_heads, repeats, head_dim, seed, hidden=20):
    """Returns weights, moments and inputs; the Fisher blocks agree on every path, as they do without a rotation."""
    g = torch.Generator().manual_seed(seed)
    n = kv_heads * head_dim
    rows = [(repeats * n, hidden), (n, hidden), (n, hidden), (hidden, repeats * n)]
    weights = Projections(*(torch.randn(shape, generator=g).double() for shape in rows))
    x = torch.randn(200, hidden, generator=g).double()
    key, value = (torch.randn(300, n, generator=g).double() for _ in range(2))
    rows = torch.stack([key, value, key, key], dim=1).flatten(1)
    fisher = (rows.T @ rows / 300).view(4, n, 4, n)
    return weights, LayerMoments(x.T @ x / 200, fisher, inputs=lambda: unweighted(x)), x


def unweighted(x):
    """Returns inputs as `LayerMoments.inputs` reads them, in two parts, with a weight of 1 for each."""
    return [(part, torch.ones(len(part), 1)) for part in x.chunk(2)]


def angles(head_dim, theta=50.0):
    """Returns the radians per position of each rotary frequency."""
    return torch.tensor([theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]).double()


def dense_scores(weights, x, kv_heads, head_dim):
    """Returns the scaled, rotated scores (H, T, T) of grouped-query attention."""
    projected = ((x @ w.T).view(len(x), -1, head_dim).transpose(0, 1)[None] for w in weights[:2])
    q, k = (rotate_by_angles(part, angles(head_dim)) for part in projected)
    k = k.repeat_interleave(q.shape[1] // kv_heads, dim=1)
    return (q @ k.mT)[0] / math.sqrt(head_dim)


def v3_attention(tensors, x, heads, rope_dim, v_dim, rope_angles, eps=1e-6):
    """Returns scaled scores (H, T, T) and values (H, T, v) of a V3 block, as in DeepSeek-V2, section 2.1."""
    rank = len(tensors["kv_a_layernorm.weight"])
    down = x @ tensors["kv_a_proj_with_mqa.weight"].T + tensors.get("kv_a_proj_with_mqa.bias", 0.0)
    c, k_rope = down[:, :rank], down[:, rank:]
    n = c / (c.square().mean(-1, keepdim=True) + eps).sqrt() * tensors["kv_a_layernorm.weight"]
    q = (x @ tensors["q_proj.weight"].T).view(len(x), heads, -1).transpose(0, 1)
    up = (n @ tensors["kv_b_proj.weight"].T).view(len(x), heads, -1).transpose(0, 1)
    turned = [turn(part, rope_angles) for part in (q[..., q.shape[-1] - rope_dim :], k_rope)]
    nope = q[..., : q.shape[-1] - rope_dim] @ up[..., : up.shape[-1] - v_dim].mT
    return (nope + turned[0] @ turned[1].mT) / math.sqrt(q.shape[-1]), up[..., up.shape[-1] - v_dim :]


def random_latent(compression, moments, rank, seed=0):
    """Returns the best encoder of that rank, a decoder that has nothing to do with it, and white moments."""
    shape = (len(compression.target_YX), rank)
    decoder = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()
    return Latent(compression.encode(moments.input_XX, rank), decoder, torch.eye(rank).double(), 0.0, 0.0)


def in_source_sizes(weights, compression, latent, head_dim, moments, **sizes):
    """Returns the low-rank tensors, heads as wide as the source's where `sizes` gives no other width."""
    wanted = HeadSizes(head_dim, sizes.get("nope_dim", head_dim), sizes.get("v_dim", head_dim))
    heads = fit_heads(weights, compression, latent, wanted, moments.input_XX)
    return low_rank_tensors(weights, compression, latent, heads, head_dim)


def turn(x, rope_angles):
    """Returns RoPE in V3's layout, pairs (2i, 2i + 1)."""
    phase = torch.polar(torch.ones(()).double(), torch.arange(x.shape[-2])[:, None] * rope_angles)
    return torch.view_as_real(torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous()) * phase).flatten(-2)


def normed(x, gain, eps=0.0):
    """Returns RMSNorm."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gain

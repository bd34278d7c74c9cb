"""Heads in other widths and queries by way of a latent: exact where there is room, else the best of their size."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smolseek.conversion.mla.heads import QueryLatent, exact_query, fit_heads, query_encoder, resize_heads
from smolseek.conversion.mla.latent import LATENT_RMS, compress
from smolseek.conversion.mla.layout import low_rank_tensors
from smolseek.conversion.mla.plans import rope_plans
from smolseek.conversion.mla.rope_slots import to_complex
from smolseek.conversion.mla.weights import HeadSizes
from tests.conversion.mla.blocks import (
    angles,
    in_source_sizes,
    normed,
    quick,
    random_latent,
    random_layer,
    shapes,
    v3_attention,
)

drawn_heads = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 7), st.integers(0, 10**6))


@given(drawn_heads)
@quick
def test_resized_heads_are_the_best_of_their_width(drawn):
    """By Eckart and Young, with the moments as weights. A width that holds the head changes nothing."""
    heads, head_dim, width, seed = drawn
    g = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(heads, head_dim, n, generator=g).double() for n in (9, 6))
    x, y = (torch.randn(n + 5, n, generator=g).double() for n in (9, 6))
    resized = resize_heads(left, right, x.T @ x, y.T @ y, width)
    assert [tuple(part.shape) for part in resized] == [(heads, width, 9), (heads, width, 6)]
    whole, kept = (x @ a.mT @ b @ y.T for a, b in ((left, right), resized))
    spectrum = torch.linalg.svdvals(whole)
    torch.testing.assert_close((whole - kept).square().sum((1, 2)), spectrum[:, width:].square().sum(1))


def test_resized_heads_of_dead_weights_are_zeros():
    dead = resize_heads(torch.zeros(1, 4, 5).double(), torch.ones(1, 4, 3).double(), None, torch.eye(3).double(), 2)
    assert all(part.isfinite().all() for part in dead) and not (dead[0].mT @ dead[1]).any()


@given(shapes)
@quick
def test_wider_and_full_width_heads_keep_scores_and_output(shape):
    kv_heads, repeats, head_dim, seed = shape
    weights, moments, x = random_layer(kv_heads, repeats, head_dim, seed)
    compression = compress(weights, moments, rope_plans(head_dim, head_dim)[0], head_dim)
    latent = random_latent(compression, moments, 6, seed)
    made = []
    for nope_dim, v_dim in ((head_dim, head_dim), (head_dim + 3, head_dim + 1)):
        wanted = {"nope_dim": nope_dim, "v_dim": v_dim}
        tensors = in_source_sizes(weights, compression, latent, head_dim, moments, **wanted)
        scores, values = v3_attention(tensors, x[:7], kv_heads * repeats, head_dim, v_dim, angles(head_dim))
        made.append((scores, values.transpose(0, 1).flatten(1) @ tensors["o_proj.weight"].T))
    torch.testing.assert_close(made[0], made[1])


@given(shapes, st.booleans())
@quick
def test_a_query_latent_of_full_rank_loses_nothing(shape, biased):
    _, _, _, seed = shape
    g = torch.Generator().manual_seed(seed)
    gain = 1 + torch.rand(20, generator=g).double()
    x = normed(torch.randn(30, 20, generator=g).double(), gain)
    x = torch.cat([x, torch.ones(30, 1).double()], dim=1) if biased else x
    query = torch.randn(1, 16, x.shape[1], generator=g).double()
    latent = exact_query(query, gain, x.shape[1])
    assert latent is not None and exact_query(query, gain, x.shape[1] - 1) is None
    for eps in (1e-6, 1e-3):
        made = normed(x @ latent.encoder_qX.T, 1.0, eps) @ latent.decoder.T
        torch.testing.assert_close(made, x @ query[0].T, rtol=1e-5, atol=1e-5)


def test_a_gain_of_zero_allows_no_exact_query():
    gain = torch.ones(20).double()
    gain[3] = 0.0
    assert exact_query(torch.randn(1, 16, 20).double(), gain, 20) is None
    assert exact_query(torch.randn(1, 16, 21).double(), gain, 21) is not None


@given(shapes, st.integers(1, 6))
@quick
def test_query_encoder_is_the_best_of_its_rank_under_the_keys_weight(shape, rank):
    kv_heads, repeats, head_dim, seed = shape
    weights, moments, x = random_layer(kv_heads, repeats, head_dim, seed)
    compression = compress(weights, moments, rope_plans(head_dim, head_dim)[0], head_dim)
    latent = random_latent(compression, moments, 6, seed)
    heads = fit_heads(weights, compression, latent, HeadSizes(head_dim, head_dim, head_dim), moments.input_XX)
    encoder = query_encoder(heads, weights, compression, latent.normed_CC, moments.input_XX, rank)
    slots = compression.slot_encoder_sc @ to_complex(weights.key, head_dim)
    energy = ((slots @ moments.input_XX.to(slots.dtype)) * slots.conj()).sum(-1).real.repeat_interleave(2) / 2
    query = (x @ heads.query_HQX.flatten(0, 1).T).view(len(x), kv_heads * repeats, -1)
    weighted = torch.cat(
        [
            torch.einsum("thn,hnr->thr", query[..., :head_dim], heads.up_k_HUC),
            query[..., head_dim:] * energy.sqrt(),
        ],
        dim=-1,
    ).flatten(1)
    c = x @ encoder.T
    left = weighted - c @ torch.linalg.lstsq(c, weighted, driver="gelsd").solution
    spectrum = torch.linalg.svdvals(weighted)
    assert float(left.square().sum()) == pytest.approx(float(spectrum[rank:].square().sum()), rel=1e-6, abs=1e-6)
    assert float(c.square().mean().sqrt()) == pytest.approx(LATENT_RMS)
    query_latent = QueryLatent(encoder, heads.query_HQX.flatten(0, 1) @ encoder.T)
    tensors = low_rank_tensors(weights, compression, latent, heads, head_dim, query_latent)
    assert tensors["q_a_proj.weight"].shape == (rank, 20) and "q_proj.weight" not in tensors

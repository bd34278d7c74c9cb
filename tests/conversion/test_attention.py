"""The closed form as algebra: what must be exact is exact, in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smolseek.conversion.attention import (
    LATENT_RMS,
    Projections,
    RopePlan,
    complex_moment,
    compress,
    damping,
    exact_tensors,
    interleave,
    latent_errors,
    portable_tensors,
    refit_decoder,
    roots,
    rope_plans,
    to_complex,
    to_real,
)
from smolseek.conversion.moments import LayerMoments, NormMoments, rotate

quick = settings(max_examples=8, deadline=None)
shapes = st.tuples(st.sampled_from([1, 2, 3]), st.sampled_from([1, 2]), st.sampled_from([4, 8]), st.integers(0, 10**6))


def random_layer(kv_heads, repeats, head_dim, seed, hidden=20):
    """Weights and moments whose Fisher blocks agree on every path, as they do where nothing turns."""
    g = torch.Generator().manual_seed(seed)
    n = kv_heads * head_dim
    weights = Projections(*(torch.randn(rows, hidden, generator=g).double() for rows in (repeats * n, n, n)))
    x = torch.randn(200, hidden, generator=g).double()
    key, value = (torch.randn(300, n, generator=g).double() for _ in range(2))
    rows = torch.stack([key, value, key, key], dim=1).flatten(1)
    fisher = (rows.T @ rows / 300).view(4, n, 4, n)
    return weights, LayerMoments(x.T @ x / 200, fisher), x


def angles(head_dim, theta=50.0):
    return torch.tensor([theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]).double()


def dense_scores(weights, x, kv_heads, head_dim):
    """Scaled rotated scores (H, T, T) of grouped-query attention."""
    q, k = (rotate((x @ w.T).view(len(x), -1, head_dim).transpose(0, 1)[None], angles(head_dim)) for w in weights[:2])
    k = k.repeat_interleave(q.shape[1] // kv_heads, dim=1)
    return (q @ k.mT)[0] / math.sqrt(head_dim)


def mla(tensors, x, heads, rope_dim, v_dim, rope_angles, eps=1e-6):
    """Scaled scores (H, T, T) and values (H, T, v_dim) of a V3 block, written out from the paper."""
    rank = len(tensors["kv_a_layernorm.weight"])
    down = x @ tensors["kv_a_proj_with_mqa.weight"].T + tensors.get("kv_a_proj_with_mqa.bias", 0.0)
    c, k_rope = down[:, :rank], down[:, rank:]
    n = c / (c.square().mean(-1, keepdim=True) + eps).sqrt() * tensors["kv_a_layernorm.weight"]
    q = (x @ tensors["q_proj.weight"].T).view(len(x), heads, -1).transpose(0, 1)
    up = (n @ tensors["kv_b_proj.weight"].T).view(len(x), heads, -1).transpose(0, 1)
    turned = [turn(part, rope_angles) for part in (q[..., q.shape[-1] - rope_dim :], k_rope)]
    nope = q[..., : q.shape[-1] - rope_dim] @ up[..., : up.shape[-1] - v_dim].mT
    return (nope + turned[0] @ turned[1].mT) / math.sqrt(q.shape[-1]), up[..., up.shape[-1] - v_dim :]


def turn(x, rope_angles):
    """RoPE of V3's layout, (2i, 2i + 1)."""
    phase = torch.polar(torch.ones(()).double(), torch.arange(x.shape[-2])[:, None] * rope_angles)
    return torch.view_as_real(torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous()) * phase).flatten(-2)


@given(shapes)
@quick
def test_complex_form_keeps_moments_and_comes_back(shape):
    kv_heads, _, head_dim, seed = shape
    k = torch.randn(50, kv_heads * head_dim, generator=torch.Generator().manual_seed(seed)).double()
    kappa = to_complex(k.T, head_dim)
    assert torch.equal(to_real(kappa, head_dim), k.T)
    torch.testing.assert_close(complex_moment(k.T @ k, head_dim), kappa @ kappa.mH)
    assert torch.equal(interleave(kappa)[0::2], kappa.real)
    assert torch.equal(interleave(kappa)[1::2], kappa.imag)


@given(shapes)
@quick
def test_turning_complex_channels_is_llamas_rope(shape):
    kv_heads, _, head_dim, seed = shape
    k = torch.randn(1, kv_heads, 6, head_dim, generator=torch.Generator().manual_seed(seed)).double()
    phase = torch.polar(torch.ones(()).double(), torch.arange(6)[:, None] * angles(head_dim))
    kappa = torch.complex(*k.chunk(2, dim=-1)) * phase
    torch.testing.assert_close(rotate(k, angles(head_dim)), torch.cat([kappa.real, kappa.imag], -1))


@pytest.mark.parametrize(("head_dim", "rope_dim"), [(8, 8), (8, 4), (8, 2), (64, 16), (24, 4), (12, 4)])
def test_plans_put_each_slot_exactly_on_the_frequency_it_starts_with(head_dim, rope_dim):
    plans = rope_plans(head_dim, rope_dim)
    assert len(set(plans)) == len(plans)
    for plan in plans:
        theta = plan.rope_theta(1000.0, head_dim)
        taken = [channel for fold in plan.folds for channel in fold]
        assert len(plan.folds) == rope_dim // 2
        assert len(set(taken)) == len(taken) and max(taken) < head_dim // 2
        for slot, fold in enumerate(plan.folds):
            assert theta ** (-2 * slot / rope_dim) == pytest.approx(1000.0 ** (-2 * fold[0] / head_dim))
            assert {plan.slot_frequencies(head_dim)[channel] for channel in fold} == {fold[0]}


@given(shapes)
@quick
def test_one_kv_head_with_full_rope_keeps_all_scores(shape):
    _, repeats, head_dim, seed = shape
    weights, moments, x = random_layer(1, repeats, head_dim, seed)
    plan = rope_plans(head_dim, head_dim)[0]
    compression = compress(weights, moments, plan, head_dim, rank=head_dim)
    tensors = portable_tensors(weights, compression, torch.zeros(2 * head_dim, head_dim).double(), head_dim)
    scores, _ = mla(tensors, x[:7], repeats, head_dim, head_dim, angles(head_dim))
    torch.testing.assert_close(scores, dense_scores(weights, x[:7], 1, head_dim))
    assert compression.rope_energy_kept == pytest.approx(1.0)


@given(shapes, st.integers(0, 2))
@quick
def test_exact_form_keeps_scores_and_values(shape, nope_dim):
    kv_heads, repeats, head_dim, seed = shape
    weights, _, x = random_layer(kv_heads, repeats, head_dim, seed)
    tensors = exact_tensors(weights, head_dim, nope_dim)
    scores, values = mla(
        tensors, x[:7], kv_heads * repeats, kv_heads * head_dim, head_dim, angles(head_dim).repeat(kv_heads)
    )
    torch.testing.assert_close(scores, dense_scores(weights, x[:7], kv_heads, head_dim))
    expected = (x[:7] @ weights.value.T).view(7, kv_heads, head_dim).transpose(0, 1)
    torch.testing.assert_close(values, expected.repeat_interleave(repeats, dim=0), rtol=1e-6, atol=1e-6)


@given(shapes)
@quick
def test_slots_and_latent_together_stand_for_keys_and_values_where_nothing_turns(shape):
    """With equal gradients on all paths the regression gives keys - slot keys and values; at full rank all is kept."""
    kv_heads, repeats, head_dim, seed = shape
    weights, moments, x = random_layer(kv_heads, repeats, head_dim, seed)
    rank = min(20, 2 * kv_heads * head_dim)
    for plan in rope_plans(head_dim, head_dim // 2):
        compression = compress(weights, moments, plan, head_dim, rank)
        slots = compression.slot_decoder_CS @ compression.slot_encoder_SC @ to_complex(weights.key, head_dim)
        together = compression.target_YD + torch.cat([to_real(slots, head_dim), torch.zeros_like(weights.value)])
        torch.testing.assert_close(together, torch.cat([weights.key, weights.value]))
        y = x @ compression.target_YD.T
        c = x @ compression.encoder_RD.T
        again = torch.linalg.lstsq(c, y, driver="gelsd").solution
        torch.testing.assert_close(c @ again, y, rtol=1e-4, atol=1e-4)
        assert float(c.square().mean().sqrt()) == pytest.approx(LATENT_RMS)


@given(shapes, st.integers(1, 6))
@quick
def test_encoder_is_the_best_of_its_rank_under_the_fisher_weight(shape, rank):
    """Eckart and Young: the weighted error left over is the tail of the spectrum."""
    kv_heads, repeats, head_dim, seed = shape
    weights, moments, x = random_layer(kv_heads, repeats, head_dim, seed)
    compression = compress(weights, moments, rope_plans(head_dim, head_dim)[0], head_dim, rank)
    fisher = moments.fisher([0, 1], [0, 1])
    y = x @ compression.target_YD.T @ roots(fisher + damping(fisher))[0]
    c = x @ compression.encoder_RD.T
    left = y - c @ torch.linalg.lstsq(c, y, driver="gelsd").solution
    spectrum = torch.linalg.svdvals(y)
    assert float(left.square().sum()) == pytest.approx(float(spectrum[rank:].square().sum()), rel=1e-6, abs=1e-6)


@given(shapes)
@quick
def test_refit_is_least_squares_and_its_error_is_what_is_reported(shape):
    kv_heads, repeats, head_dim, seed = shape
    weights, moments, x = random_layer(kv_heads, repeats, head_dim, seed)
    compression = compress(weights, moments, rope_plans(head_dim, head_dim)[0], head_dim, 3)
    c = x @ compression.encoder_RD.T
    n = c / c.square().mean(-1, keepdim=True).sqrt()
    norm = NormMoments(n.T @ n / len(x), x.T @ n / len(x))
    y = x @ compression.target_YD.T
    decoder = refit_decoder(compression.target_YD, norm)
    torch.testing.assert_close(decoder, torch.linalg.lstsq(n, y).solution.T, rtol=1e-3, atol=1e-3)
    _, plain = latent_errors(compression, decoder, moments, norm)
    assert plain == pytest.approx(float((y - n @ decoder.T).square().sum() / y.square().sum()), rel=1e-6)


def test_dead_channels_do_no_harm():
    """A value that the loss does not feel and a frequency that carries nothing give zeros, not NaN."""
    weights, moments, _ = random_layer(2, 1, 4, 0)
    weights.key[0] = weights.key[2] = weights.key[4] = weights.key[6] = 0.0
    moments.fisher_PKPK[1, 3] = 0.0
    moments.fisher_PKPK[:, :, 1, 3] = 0.0
    for plan in rope_plans(4, 2):
        compression = compress(weights, moments, plan, 4, 5)
        tensors = portable_tensors(weights, compression, torch.zeros(16, 5).double(), 4)
        assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_narrow_rope_has_a_folded_plan_and_full_rope_only_one():
    assert RopePlan(2, ((0, 1), (2, 3))) in rope_plans(8, 4)
    assert [plan.stride for plan in rope_plans(8, 8)] == [1]

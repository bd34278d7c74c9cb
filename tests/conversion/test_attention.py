"""The closed form as algebra: what must be exact is exact, in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smolseek.conversion.attention import (
    LATENT_RMS,
    HeadSizes,
    Projections,
    QueryLatent,
    RopePlan,
    complex_moment,
    compress,
    damping,
    exact_query,
    exact_tensors,
    fit_heads,
    fold_bias,
    fold_norms,
    interleave,
    latent_errors,
    portable_tensors,
    query_encoder,
    refit_decoder,
    resize_heads,
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
    rows = [(repeats * n, hidden), (n, hidden), (n, hidden), (hidden, repeats * n)]
    weights = Projections(*(torch.randn(shape, generator=g).double() for shape in rows))
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


def portable(weights, compression, decoder, head_dim, moments, latent, **sizes):
    """The tensors in the source's head sizes, unless told otherwise."""
    wanted = HeadSizes(head_dim, sizes.get("nope_dim", head_dim), sizes.get("v_dim", head_dim))
    heads = fit_heads(weights, compression, decoder, wanted, moments.input_DD, latent)
    return portable_tensors(weights, compression, heads, head_dim)


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


@pytest.mark.parametrize(
    ("head_dim", "rope_dim"), [(8, 8), (8, 4), (8, 2), (64, 16), (24, 4), (12, 4), (8, 6), (8, 12)]
)
def test_plans_put_each_slot_exactly_on_the_frequency_it_starts_with(head_dim, rope_dim):
    plans = rope_plans(head_dim, rope_dim)
    assert len(set(plans)) == len(plans)
    for plan in plans:
        theta = plan.rope_theta(1000.0, head_dim)
        taken = [channel for fold in plan.folds for channel in fold]
        assert len(plan.folds) == rope_dim // 2
        assert len(set(taken)) == len(taken) and max(taken) < head_dim // 2
        for slot, fold in enumerate(plan.folds):
            if not fold:
                assert slot >= head_dim // 2
                continue
            assert theta ** (-2 * slot / rope_dim) == pytest.approx(1000.0 ** (-2 * fold[0] / head_dim))
            assert {plan.slot_frequencies(head_dim)[channel] for channel in fold} == {fold[0]}


@given(shapes)
@quick
def test_one_kv_head_with_full_rope_keeps_all_scores(shape):
    _, repeats, head_dim, seed = shape
    weights, moments, x = random_layer(1, repeats, head_dim, seed)
    plan = rope_plans(head_dim, head_dim)[0]
    compression = compress(weights, moments, plan, head_dim, rank=head_dim)
    decoder = torch.zeros(2 * head_dim, head_dim).double()
    tensors = portable(weights, compression, decoder, head_dim, moments, torch.eye(head_dim).double())
    scores, _ = mla(tensors, x[:7], repeats, head_dim, head_dim, angles(head_dim))
    torch.testing.assert_close(scores, dense_scores(weights, x[:7], 1, head_dim))
    assert compression.rope_energy_kept == pytest.approx(1.0)


@given(shapes, st.booleans())
@quick
def test_exact_form_keeps_scores_and_values(shape, room_for_keys):
    kv_heads, repeats, head_dim, seed = shape
    weights, _, x = random_layer(kv_heads, repeats, head_dim, seed)
    tensors = exact_tensors(weights, head_dim, head_dim if room_for_keys else 0)
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
        tensors = portable(weights, compression, torch.zeros(16, 5).double(), 4, moments, torch.eye(5).double())
        assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_narrow_rope_has_a_folded_plan_and_full_rope_only_one():
    assert RopePlan(2, ((0, 1), (2, 3))) in rope_plans(8, 4)
    assert [plan.stride for plan in rope_plans(8, 8)] == [1]


def test_a_silent_plan_leaves_all_keys_to_the_latent():
    weights, moments, _ = random_layer(2, 1, 4, 0)
    compression = compress(weights, moments, rope_plans(4, 4)[0].silent(), 4, rank=5)
    assert not compression.slot_encoder_SC.any() and compression.rope_energy_kept == pytest.approx(0.0)
    torch.testing.assert_close(compression.target_YD, torch.cat([weights.key, weights.value]))


# -- head sizes, query ranks and biases -------------------------------------------------------------------------------

heads_drawn = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 7), st.integers(0, 10**6))


@given(heads_drawn)
@quick
def test_resized_heads_are_the_best_of_their_width(drawn):
    """Eckart and Young again, with the moments as weights; a width that holds the head changes nothing."""
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
    compression = compress(weights, moments, rope_plans(head_dim, head_dim)[0], head_dim, rank=6)
    decoder = torch.randn(2 * kv_heads * head_dim, 6, generator=torch.Generator().manual_seed(seed)).double()
    made = []
    for nope_dim, v_dim in ((head_dim, head_dim), (head_dim + 3, head_dim + 1)):
        wanted = {"nope_dim": nope_dim, "v_dim": v_dim}
        tensors = portable(weights, compression, decoder, head_dim, moments, torch.eye(6).double(), **wanted)
        scores, values = mla(tensors, x[:7], kv_heads * repeats, head_dim, v_dim, angles(head_dim))
        made.append((scores, values.transpose(0, 1).flatten(1) @ tensors["o_proj.weight"].T))
    torch.testing.assert_close(made[0], made[1])


def normed(x, gain, eps=0.0):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gain


@given(shapes, st.booleans())
@quick
def test_a_query_latent_of_full_rank_loses_nothing(shape, biased):
    _, _, _, seed = shape
    g = torch.Generator().manual_seed(seed)
    gain = 1 + torch.rand(20, generator=g).double()
    x = normed(torch.randn(30, 20, generator=g).double(), gain)
    x = torch.cat([x, torch.ones(30, 1).double()], dim=1) if biased else x
    query = torch.randn(16, x.shape[1], generator=g).double()
    latent = exact_query(query, gain, x.shape[1])
    assert latent is not None and exact_query(query, gain, x.shape[1] - 1) is None
    for eps in (1e-6, 1e-3):
        made = normed(x @ latent.encoder_PE.T, 1.0, eps) @ latent.decoder_XP.T
        torch.testing.assert_close(made, x @ query.T, rtol=1e-5, atol=1e-5)


def test_a_gain_of_zero_allows_no_exact_query():
    gain = torch.ones(20).double()
    gain[3] = 0.0
    assert exact_query(torch.randn(16, 20).double(), gain, 20) is None
    assert exact_query(torch.randn(16, 21).double(), gain, 21) is not None


@given(shapes, st.integers(1, 6))
@quick
def test_query_encoder_is_the_best_of_its_rank_under_the_keys_weight(shape, rank):
    kv_heads, repeats, head_dim, seed = shape
    weights, moments, x = random_layer(kv_heads, repeats, head_dim, seed)
    compression = compress(weights, moments, rope_plans(head_dim, head_dim)[0], head_dim, rank=6)
    decoder = torch.randn(2 * kv_heads * head_dim, 6, generator=torch.Generator().manual_seed(seed)).double()
    latent = torch.eye(6).double()
    heads = fit_heads(weights, compression, decoder, HeadSizes(head_dim, head_dim, head_dim), moments.input_DD, latent)
    encoder = query_encoder(heads, weights, compression, moments.input_DD, latent, rank)
    slots = compression.slot_encoder_SC @ to_complex(weights.key, head_dim)
    energy = ((slots @ moments.input_DD.to(slots.dtype)) * slots.conj()).sum(-1).real.repeat_interleave(2) / 2
    query = (x @ heads.query_XE.T).view(len(x), kv_heads * repeats, -1)
    weighted = torch.cat(
        [
            torch.einsum("thn,hnr->thr", query[..., :head_dim], heads.up_k_HNR),
            query[..., head_dim:] * energy.sqrt(),
        ],
        dim=-1,
    ).flatten(1)
    c = x @ encoder.T
    left = weighted - c @ torch.linalg.lstsq(c, weighted, driver="gelsd").solution
    spectrum = torch.linalg.svdvals(weighted)
    assert float(left.square().sum()) == pytest.approx(float(spectrum[rank:].square().sum()), rel=1e-6, abs=1e-6)
    assert float(c.square().mean().sqrt()) == pytest.approx(LATENT_RMS)
    tensors = portable_tensors(weights, compression, heads, head_dim, QueryLatent(encoder, heads.query_XE @ encoder.T))
    assert tensors["q_a_proj.weight"].shape == (rank, 20) and "q_proj.weight" not in tensors


@given(shapes, st.booleans())
@quick
def test_exact_form_keeps_biases_and_unrotated_keys(shape, rotates):
    kv_heads, repeats, head_dim, seed = shape
    weights, _, x = random_layer(kv_heads, repeats, head_dim, seed, hidden=21)
    biased = Projections(*weights[:3], weights.output[:20], torch.arange(20.0).double())
    x = torch.cat([x[:7, :20], torch.ones(7, 1).double()], dim=1)
    tensors = exact_tensors(biased, head_dim, head_dim, rotates=rotates)
    query = x[:, :20] @ tensors["q_a_proj.weight"].T + tensors["q_a_proj.bias"]
    query = normed(query, tensors["q_a_layernorm.weight"], 1e-6) @ tensors["q_b_proj.weight"].T
    plain = tensors | {"q_proj.weight": torch.linalg.lstsq(x, query, driver="gelsd").solution.T}
    plain["kv_a_proj_with_mqa.weight"] = torch.cat(
        [tensors["kv_a_proj_with_mqa.weight"], tensors["kv_a_proj_with_mqa.bias"][:, None]], dim=1
    )
    del plain["kv_a_proj_with_mqa.bias"]
    turns = angles(head_dim) if rotates else 0 * angles(head_dim)
    q, k = (rotate((x @ w.T).view(7, -1, head_dim).transpose(0, 1)[None], turns)[0] for w in weights[:2])
    wanted = q @ k.repeat_interleave(repeats, dim=0).mT / math.sqrt(head_dim)
    rope_angles = angles(head_dim).repeat(kv_heads)
    scores, values = mla(plain, x, kv_heads * repeats, kv_heads * head_dim, head_dim, rope_angles)
    torch.testing.assert_close(scores, wanted, rtol=1e-5, atol=1e-5)
    expected = (x @ weights.value.T).view(7, kv_heads, head_dim).transpose(0, 1)
    torch.testing.assert_close(values, expected.repeat_interleave(repeats, dim=0), rtol=1e-5, atol=1e-5)
    assert torch.equal(tensors["o_proj.bias"], torch.arange(20.0).double())


def test_folded_biases_are_exact_where_some_direction_of_the_input_is_constant():
    weights, moments, x = random_layer(2, 1, 4, 0, hidden=21)
    biased = Projections(*weights[:3], weights.output[:20])
    for constant, share in ((2.0, 0.0), (0.0, 1.0)):
        seen = torch.cat([x[:, :19] - x[:, :19].mean(0), torch.full((200, 1), constant), torch.ones(200, 1)], dim=1)
        seen = seen.double()
        folded, plain, lost = fold_bias(biased, LayerMoments(seen.T @ seen / 200, moments.fisher_PKPK))
        assert lost == pytest.approx(share, abs=1e-6) and plain.input_DD.shape == (20, 20)
        if share == 0.0:
            torch.testing.assert_close(seen[:, :20] @ folded.key.T, seen @ biased.key.T, rtol=1e-5, atol=1e-5)
    assert fold_bias(folded, plain)[2] == 0.0


@given(shapes, st.booleans())
@quick
def test_norms_are_folded_exactly_where_what_they_give_is_linear(shape, biased):
    """A norm that divides by a constant is a scale; with noise on top, what is lost is the noise's energy."""
    kv_heads, repeats, head_dim, seed = shape
    weights, moments, x = random_layer(kv_heads, repeats, head_dim, seed)
    x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1) if biased else x
    g = torch.Generator().manual_seed(seed + 1)
    made = torch.randn(len(weights.query) + len(weights.key), x.shape[1], generator=g).double()
    noise = torch.randn(len(x), len(made), generator=g).double()
    noise -= x @ torch.linalg.lstsq(x, noise).solution
    for size in (0.0, 0.3):
        z = x @ made.T + size * noise
        seen = LayerMoments(x.T @ x / 200, moments.fisher_PKPK, z.T @ x / 200, z.square().mean(0))
        folded, plain, lost = fold_norms(weights, seen)
        torch.testing.assert_close(torch.cat([folded.query, folded.key]), made, rtol=1e-6, atol=1e-6)
        parts = [slice(0, len(weights.query)), slice(len(weights.query), None)]
        shares = [float((size * noise[:, part]).square().sum() / z[:, part].square().sum()) for part in parts]
        assert lost == pytest.approx(max(shares), abs=1e-6)
        assert plain.heads_ZD is None and torch.equal(folded.value, weights.value)

"""The latent: its encoder is the best of its rank, and the slots and the latent together lose nothing at full rank."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from smolseek.conversion.mla.algebra import damping, root
from smolseek.conversion.mla.latent import (
    LATENT_RMS,
    compress,
    fit_latent,
    latent_errors,
    pad_latent,
    refit_decoder,
)
from smolseek.conversion.mla.plans import rope_plans
from smolseek.conversion.mla.rope_slots import to_complex, to_real
from smolseek.conversion.moments import NormMoments, norm_moments
from tests.conversion.mla.blocks import in_source_sizes, quick, random_layer, shapes, unweighted


@given(shapes)
@quick
def test_slots_and_latent_together_stand_for_keys_and_values_where_nothing_turns(shape):
    """Equal gradients on all paths make the target [keys - slot keys; values]; full rank then loses nothing."""
    kv_heads, repeats, head_dim, seed = shape
    weights, moments, x = random_layer(kv_heads, repeats, head_dim, seed)
    rank = min(20, 2 * kv_heads * head_dim)
    for plan in rope_plans(head_dim, head_dim // 2):
        compression = compress(weights, moments, plan, head_dim)
        slots = compression.slot_decoder_cs @ compression.slot_encoder_sc @ to_complex(weights.key, head_dim)
        together = compression.target_YX + torch.cat([to_real(slots, head_dim), torch.zeros_like(weights.value)])
        torch.testing.assert_close(together, torch.cat([weights.key, weights.value]))
        y = x @ compression.target_YX.T
        c = x @ compression.encode(moments.input_XX, rank).T
        again = torch.linalg.lstsq(c, y, driver="gelsd").solution
        torch.testing.assert_close(c @ again, y, rtol=1e-4, atol=1e-4)
        assert float(c.square().mean().sqrt()) == pytest.approx(LATENT_RMS)


@given(shapes, st.integers(1, 6))
@quick
def test_encoder_is_the_best_of_its_rank_under_the_fisher_weight(shape, rank):
    """By Eckart and Young, the remaining weighted error is the tail of the spectrum."""
    kv_heads, repeats, head_dim, seed = shape
    weights, moments, x = random_layer(kv_heads, repeats, head_dim, seed)
    compression = compress(weights, moments, rope_plans(head_dim, head_dim)[0], head_dim)
    fisher = moments.fisher([0, 1], [0, 1])
    y = x @ compression.target_YX.T @ root(fisher + damping(fisher))
    c = x @ compression.encode(moments.input_XX, rank).T
    left = y - c @ torch.linalg.lstsq(c, y, driver="gelsd").solution
    spectrum = torch.linalg.svdvals(y)
    assert float(left.square().sum()) == pytest.approx(float(spectrum[rank:].square().sum()), rel=1e-6, abs=1e-6)


@given(shapes)
@quick
def test_refit_is_least_squares_and_its_error_is_what_is_reported(shape):
    kv_heads, repeats, head_dim, seed = shape
    weights, moments, x = random_layer(kv_heads, repeats, head_dim, seed)
    compression = compress(weights, moments, rope_plans(head_dim, head_dim)[0], head_dim)
    c = x @ compression.encode(moments.input_XX, 3).T
    n = c / c.square().mean(-1, keepdim=True).sqrt()
    norm = NormMoments(n.T @ n / len(x), x.T @ n / len(x))
    y = x @ compression.target_YX.T
    decoder = refit_decoder(compression.target_YX, norm)
    torch.testing.assert_close(decoder, torch.linalg.lstsq(n, y).solution.T, rtol=1e-3, atol=1e-3)
    _, plain = latent_errors(compression.target_YX, decoder, compression.fisher_YY, moments.input_XX, norm)
    assert plain == pytest.approx(float((y - n @ decoder.T).square().sum() / y.square().sum()), rel=1e-6)


def test_a_constant_coordinate_makes_the_norm_nearly_linear():
    """With a mean such as language models have, the error behind the norm is near to that of the rank alone."""
    weights, moments, x = random_layer(3, 1, 8, 0)
    mean = 3 * torch.randn(20, generator=torch.Generator().manual_seed(1)).double()
    sizes = torch.rand(200, 1, generator=torch.Generator().manual_seed(2)).double() + 0.2
    x = x * sizes + mean
    moments = replace(moments, input_XX=x.T @ x / 200, inputs=lambda: unweighted(x))
    compression = compress(weights, moments, rope_plans(8, 8)[0], 8)
    encoder = compression.encode(moments.input_XX, 12)
    without = NormMoments(encoder @ moments.input_XX @ encoder.T, moments.input_XX @ encoder.T)
    target = compression.target_YX
    linear, behind = (
        latent_errors(target, refit_decoder(target, norm), compression.fisher_YY, moments.input_XX, norm)[0]
        for norm in (without, norm_moments(moments, encoder))
    )
    latent = fit_latent(compression.encode, target, compression.fisher_YY, moments, 12)
    first = x @ latent.encoder_CX[0]
    assert float((first / first.mean() - 1).square().mean()) < 0.01
    assert float((x @ latent.encoder_CX.T).square().mean().sqrt()) == pytest.approx(LATENT_RMS)
    assert latent.weighted_error - linear < 0.2 * (behind - linear)


def test_padding_a_latent_changes_nothing_behind_its_norm():
    weights, moments, x = random_layer(2, 2, 4, seed=0)
    (plan, *_) = rope_plans(4, 4)
    compression = compress(weights, moments, plan, 4)
    narrow = fit_latent(compression.encode, compression.target_YX, compression.fisher_YY, moments, 6)
    wide = pad_latent(narrow, 10)
    assert wide.encoder_CX.shape[0] == 10 and wide.normed_CC.shape == (10, 10)
    c, padded = (x @ latent.encoder_CX.T for latent in (narrow, wide))
    read = [F.rms_norm(z, z.shape[-1:]) @ one.decoder_YC.T for z, one in ((c, narrow), (padded, wide))]
    torch.testing.assert_close(read[1], read[0])
    assert wide.normed_CC.trace() == pytest.approx(10) and narrow.normed_CC.trace() == pytest.approx(6)


def test_inputs_without_a_mean_get_no_constant_coordinate():
    weights, moments, _ = random_layer(2, 1, 4, 0)
    compression = compress(weights, moments, rope_plans(4, 4)[0], 4)
    latent = fit_latent(compression.encode, compression.target_YX, compression.fisher_YY, moments, 5)
    torch.testing.assert_close(latent.encoder_CX, compression.encode(moments.input_XX, 5))


def test_dead_channels_do_no_harm():
    """A value without gradient and a frequency without energy give zeros, not NaN."""
    weights, moments, _ = random_layer(2, 1, 4, 0)
    weights.key[0] = weights.key[2] = weights.key[4] = weights.key[6] = 0.0
    moments.fisher_4k4k[1, 3] = 0.0
    moments.fisher_4k4k[:, :, 1, 3] = 0.0
    for plan in rope_plans(4, 2):
        compression = compress(weights, moments, plan, 4)
        latent = fit_latent(compression.encode, compression.target_YX, compression.fisher_YY, moments, 5)
        tensors = in_source_sizes(weights, compression, latent, 4, moments)
        assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_an_emptied_plan_leaves_all_keys_to_the_latent():
    weights, moments, _ = random_layer(2, 1, 4, 0)
    compression = compress(weights, moments, rope_plans(4, 4)[0].emptied(), 4)
    assert not compression.slot_encoder_sc.any() and compression.rope_energy_kept == pytest.approx(0.0)
    torch.testing.assert_close(compression.target_YX, torch.cat([weights.key, weights.value]))

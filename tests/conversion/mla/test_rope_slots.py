"""Rope slots: complex channels turn like Llama's pairs, and a slot turns exactly like its first frequency."""

import pytest
import torch
from hypothesis import given

from smolseek.conversion.mla.latent import compress
from smolseek.conversion.mla.plans import RopePlan, rope_plans
from smolseek.conversion.mla.rope_slots import complex_moment, interleave, to_complex, to_real
from smolseek.conversion.probe import rotate_by_angles
from tests.conversion.mla.blocks import (
    angles,
    dense_scores,
    in_source_sizes,
    quick,
    random_latent,
    random_layer,
    shapes,
    v3_attention,
)


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
    torch.testing.assert_close(rotate_by_angles(k, angles(head_dim)), torch.cat([kappa.real, kappa.imag], -1))


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
            angles = plan.angles(range(100, 100 + len(plan.folds)), range(head_dim // 2))
            assert {angles[channel] for channel in fold} == {100 + slot}


def test_narrow_rope_has_a_folded_plan_and_full_rope_only_one():
    assert RopePlan(2, ((0, 1), (2, 3))) in rope_plans(8, 4)
    assert [plan.stride for plan in rope_plans(8, 8)] == [1]


def test_many_slots_have_one_plan_that_folds_all_frequencies():
    assert rope_plans(64, 32) == [RopePlan(2, tuple((2 * j, 2 * j + 1) for j in range(16)))]
    assert rope_plans(128, 32) == [RopePlan(4, tuple(tuple(range(4 * j, 4 * j + 4)) for j in range(16)))]
    assert [plan.stride for plan in rope_plans(64, 16)] == [1, 2, 2, 4, 4]


@given(shapes)
@quick
def test_one_kv_head_with_full_rope_keeps_all_scores(shape):
    _, repeats, head_dim, seed = shape
    weights, moments, x = random_layer(1, repeats, head_dim, seed)
    plan = rope_plans(head_dim, head_dim)[0]
    compression = compress(weights, moments, plan, head_dim)
    latent = random_latent(compression, moments, head_dim)
    tensors = in_source_sizes(
        weights, compression, latent._replace(decoder_YC=0 * latent.decoder_YC), head_dim, moments
    )
    scores, _ = v3_attention(tensors, x[:7], repeats, head_dim, head_dim, angles(head_dim))
    torch.testing.assert_close(scores, dense_scores(weights, x[:7], 1, head_dim))
    assert compression.rope_energy_kept == pytest.approx(1.0)

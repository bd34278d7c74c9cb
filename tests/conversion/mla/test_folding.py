"""Biases and norms on heads are folded exactly where a linear map can hold them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smolseek.conversion.mla.folding import fold_bias, fold_norms
from smolseek.conversion.mla.weights import Projections
from smolseek.conversion.moments import LayerMoments
from tests.conversion.mla.blocks import quick, random_layer, shapes


def test_folded_biases_are_exact_where_some_direction_of_the_input_is_constant():
    weights, moments, x = random_layer(2, 1, 4, 0, hidden=21)
    biased = Projections(*weights[:3], weights.output[:20])
    for constant, share in ((2.0, 0.0), (0.0, 1.0)):
        seen = torch.cat([x[:, :19] - x[:, :19].mean(0), torch.full((200, 1), constant), torch.ones(200, 1)], dim=1)
        seen = seen.double()
        folded, plain, lost = fold_bias(biased, LayerMoments(seen.T @ seen / 200, moments.fisher_4k4k))
        assert lost == pytest.approx(share, abs=1e-6) and plain.input_XX.shape == (20, 20)
        if share == 0.0:
            torch.testing.assert_close(seen[:, :20] @ folded.key.T, seen @ biased.key.T, rtol=1e-5, atol=1e-5)
    assert fold_bias(folded, plain)[2] == 0.0


@given(shapes, st.booleans())
@quick
def test_norms_are_folded_exactly_where_what_they_give_is_linear(shape, biased):
    """A norm that divides by a constant is linear, and loses nothing; noise on top is lost, and its energy is told."""
    kv_heads, repeats, head_dim, seed = shape
    weights, moments, x = random_layer(kv_heads, repeats, head_dim, seed)
    x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1) if biased else x
    g = torch.Generator().manual_seed(seed + 1)
    made = torch.randn(len(weights.query) + len(weights.key), x.shape[1], generator=g).double()
    noise = torch.randn(len(x), len(made), generator=g).double()
    noise -= x @ torch.linalg.lstsq(x, noise).solution
    for size in (0.0, 0.3):
        z = x @ made.T + size * noise
        seen = LayerMoments(x.T @ x / 200, moments.fisher_4k4k, z.T @ x / 200, z.square().mean(0))
        folded, plain, lost = fold_norms(weights, seen)
        torch.testing.assert_close(torch.cat([folded.query, folded.key]), made, rtol=1e-6, atol=1e-6)
        parts = [slice(0, len(weights.query)), slice(len(weights.query), None)]
        shares = [float((size * noise[:, part]).square().sum() / z[:, part].square().sum()) for part in parts]
        assert lost == pytest.approx(max(shares), abs=1e-6)
        assert plain.heads_ZX is None and torch.equal(folded.value, weights.value)

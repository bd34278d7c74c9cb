"""Second moments of block inputs and of normalised latents are those of the tokens themselves."""

import pytest
import torch

from smolseek.conversion.collect import collect_moments
from smolseek.conversion.moments import input_mean, norm_moments
from tests.factories import random_ids

pytestmark = pytest.mark.usefixtures("fp32")


def test_input_and_norm_moments_are_those_of_the_block_input(dense, angles, tmp_path):
    ids = random_ids(3, 8)
    inputs = []
    projection = dense.model.layers[0].self_attn.k_proj
    handle = projection.register_forward_hook(
        lambda _, args, out: inputs.append(args[0].detach().flatten(0, 1).double())
    )
    dense(ids)
    handle.remove()
    x = inputs[0]
    encoder = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).double()
    layer = collect_moments(dense, ids, angles, seed=0, folder=tmp_path)[0]()
    norm = norm_moments(layer, encoder)
    weight = torch.cat([weight for _, weight in layer.inputs()]).double()
    c = x @ encoder.T
    n = c / (c.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    weighted = (weight * x).T
    torch.testing.assert_close(torch.cat([x for x, _ in layer.inputs()]).double(), x, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(input_mean(layer), weighted.mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.input_XX, weighted @ x / 24, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm.latent_CC, (weight * n).T @ n / 24, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm.cross_XC, weighted @ n / 24, rtol=1e-5, atol=1e-6)

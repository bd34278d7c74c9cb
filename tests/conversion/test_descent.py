"""Steps are relative to a parameter's scale, and a latent's scale does not matter."""

import pytest
import torch

from smolseek.conversion.descent import Descent, scale_latents
from smolseek.conversion.mla.latent import LATENT_RMS
from tests.factories import layers_of, random_ids, tiny_v3


@pytest.mark.parametrize("muon_heads", [None, 1, 4])
def test_a_step_moves_a_parameter_by_its_rate_whatever_its_scale(muon_heads):
    g = torch.Generator().manual_seed(0)
    for scale in (1e-3, 1.0, 1e3):
        parameter = torch.nn.Parameter(scale * torch.randn(12, 16, generator=g))
        before = parameter.detach().clone()
        descent = Descent({"q_proj.weight": parameter}, rate=0.1, steps=1, muon_heads=muon_heads)
        descent.step((parameter * torch.randn(12, 16, generator=g)).sum())
        moved = (parameter.detach() - before).square().mean().sqrt() / before.square().mean().sqrt()
        assert 0.05 < float(moved) < 0.15
        descent.end()
        assert not parameter.requires_grad


def test_scaling_latents_changes_nothing_behind_the_norm():
    model = tiny_v3(q_lora_rank=16)
    ids = random_ids(2, 12)
    before = model(ids)
    for layer in layers_of(model):
        scale_latents(layer.self_attn, LATENT_RMS)
    torch.testing.assert_close(model(ids), before, rtol=1e-4, atol=1e-4)

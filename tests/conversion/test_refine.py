"""Layer-wise refinement of an attention block: lower errors, the same every time."""

import copy

import pytest
import torch

from smolseek.conversion.descent import scale_latents
from smolseek.conversion.mla.latent import LATENT_RMS
from smolseek.conversion.refine import attention_error, refine_attention
from smolseek.conversion.residual_stream import ResidualStream
from smolseek.model import DeepseekV3
from tests.factories import enliven, layers_of, random_ids, tiny_v3_config


@pytest.fixture
def block():
    """A V3 attention block of the dense model's hidden size, its latent scaled as in a conversion."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    model = DeepseekV3(tiny_v3_config(hidden_size=32, kv_lora_rank=8, num_hidden_layers=1, **heads))
    enliven(model)
    attention = layers_of(model)[0].self_attn.requires_grad_(False)
    scale_latents(attention, LATENT_RMS)
    return attention, model.model.rope(16)


def test_refinement_lowers_the_error_and_repeats_itself(teacher, block):
    attention, rope = block
    twin = copy.deepcopy(attention)
    stream = ResidualStream(teacher.model, random_ids(12, 16))
    stream.enter(0)
    before = attention_error(attention, rope, stream)
    for each in (attention, twin):
        refine_attention(each, rope, stream, steps=30, seed=3)
    assert attention_error(attention, rope, stream) < 0.7 * before
    for ours, theirs in zip(attention.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)

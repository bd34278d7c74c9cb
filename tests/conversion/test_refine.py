"""Layer-wise refinement of an attention block: lower errors, the same every time."""

import copy
from types import SimpleNamespace

import pytest
import torch

from smolseek.config import ConvertSettings
from smolseek.conversion import refine
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
        refine_attention(each, [(rope, stream)], steps=30, seed=3, rate=0.015)
    assert attention_error(attention, rope, stream) < 0.7 * before
    for ours, theirs in zip(attention.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_refinement_keeps_what_windows_begin_with(teacher, block):
    """One token in 16 begins a window, and those of two windows are few kinds: the shortest texts teach the others."""
    attention, rope = block
    twin = copy.deepcopy(attention)
    windows, openings, others = (ResidualStream(teacher.model, random_ids(*s)) for s in ((2, 16), (64, 1), (500, 1)))
    for stream in (windows, openings, others):
        stream.enter(0)
    short = tuple(part[:, :1] for part in rope)
    both = [(rope, windows), (short, openings)]
    refine_attention(attention, [(rope, windows)], steps=30, seed=3, rate=0.015)
    refine_attention(twin, both, steps=30, seed=3, rate=0.015)
    assert attention_error(twin, short, others) < 0.8 * attention_error(attention, short, others)


def test_a_block_that_refinement_breaks_is_as_before(teacher, block, monkeypatch):
    """A NaN is not smaller than the error before, and not kept; the report names the error of what is kept."""
    attention, rope = block
    stream = ResidualStream(teacher.model, random_ids(4, 16))
    stream.enter(0)
    before = copy.deepcopy(attention.state_dict())

    def break_it(block, *_, **__):
        for parameter in block.parameters():
            parameter.data.fill_(float("nan"))

    monkeypatch.setattr(refine, "refine_attention", break_it)
    monkeypatch.setattr(refine, "is_small", lambda source: True)
    job = SimpleNamespace(settings=ConvertSettings(), refine_steps=1, source=None)
    facts = refine._refine_attention(job, attention, [(rope, stream)], 0)
    assert facts["attention_error"] == facts["attention_error_refined"] == attention_error(attention, rope, stream)
    assert all(torch.equal(tensor, before[name]) for name, tensor in attention.state_dict().items())

"""Training of blocks and of the whole: the right targets, lower errors, the same every time."""

import copy

import pytest
import torch

from smolseek.conversion.attention import LATENT_RMS
from smolseek.conversion.refine import (
    Descent,
    ResidualStream,
    attention_error,
    distill,
    layers_of,
    refine_attention,
    scale_latents,
    shuffled,
)
from smolseek.model import DeepseekV3
from tests.factories import enliven, random_ids, tiny_llama, tiny_v3, tiny_v3_config


@pytest.fixture(scope="module")
def dense():
    return tiny_llama().requires_grad_(False)


@pytest.fixture
def block():
    """A V3 attention block of the dense model's hidden size, its latent scaled as converted ones are."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    model = DeepseekV3(tiny_v3_config(hidden_size=32, kv_lora_rank=8, num_hidden_layers=1, **heads))
    enliven(model)
    attention = layers_of(model)[0].self_attn.requires_grad_(False)
    scale_latents(attention, LATENT_RMS)
    return attention, model.model.rope(16)


def test_the_stream_is_the_dense_models_own(dense):
    ids = random_ids(5, 16)
    states = dense(ids, output_hidden_states=True).hidden_states
    stream = ResidualStream(dense.model, ids)
    for index in range(2):
        torch.testing.assert_close(stream.hidden_NTD, states[index])
        before = stream.hidden_NTD.clone()
        stream.enter(index)
        x, out = stream.attention(slice(None))
        torch.testing.assert_close(x, dense.model.layers[index].input_layernorm(before))
        stream.pass_attention()
        torch.testing.assert_close(stream.hidden_NTD, before + out)
        norm = dense.model.layers[index].post_attention_layernorm
        for inputs in stream.mlp_inputs():  # so few windows are probe and training text at once
            torch.testing.assert_close(inputs, norm(stream.hidden_NTD).flatten(0, 1))
        stream.pass_mlp()
    torch.testing.assert_close(dense.model.norm(stream.hidden_NTD), states[-1])


def test_the_probe_is_not_trained_on(dense):
    stream = ResidualStream(dense.model, random_ids(140, 16))
    assert (stream.probe, stream.batch) == (128, 64)
    stream.enter(0)
    probe, rest = stream.mlp_inputs()
    assert len(probe) == 128 * 16 and len(rest) == 12 * 16
    assert {tuple(sorted(rows.tolist())) for rows in stream.batches(3, seed=0)} == {tuple(range(128, 140))}


def test_shuffled_takes_every_window_before_any_comes_again():
    rows = torch.cat(list(shuffled(7, 3, 7, seed=0)))
    assert len(rows) == 21
    assert all(sorted(epoch.tolist()) == list(range(7)) for epoch in rows.split(7))
    assert [len(batch) for batch in shuffled(2, 5, 3, seed=0)] == [2, 2, 2]
    assert torch.equal(rows, torch.cat(list(shuffled(7, 3, 7, seed=0))))


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


def test_refinement_lowers_the_error_and_repeats_itself(dense, block):
    attention, rope = block
    twin = copy.deepcopy(attention)
    stream = ResidualStream(dense.model, random_ids(12, 16))
    stream.enter(0)
    before = attention_error(attention, rope, stream)
    for each in (attention, twin):
        refine_attention(each, rope, stream, steps=30, seed=3)
    assert attention_error(attention, rope, stream) < 0.7 * before
    for ours, theirs in zip(attention.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_scaling_latents_changes_nothing_behind_the_norm():
    model = tiny_v3(q_lora_rank=16)
    ids = random_ids(2, 12)
    before = model(ids)
    for layer in layers_of(model):
        scale_latents(layer.self_attn, LATENT_RMS)
    torch.testing.assert_close(model(ids), before, rtol=1e-4, atol=1e-4)


def test_distillation_brings_the_logits_nearer_and_balances(dense):
    student = tiny_v3(first_k_dense_replace=0)
    windows = random_ids(12, 16)
    trained = dict(student.named_parameters())
    biases = [layer.mlp.gate.e_score_correction_bias.clone() for layer in layers_of(student)]

    def divergence():
        with torch.no_grad():
            target, ours = dense(windows).logits.log_softmax(-1), student(windows).log_softmax(-1)
        return float((target.exp() * (target - ours)).sum(-1).mean())

    before, done = divergence(), []
    distill(student, dense, windows, trained, steps=20, seed=0, on_step=done.append)
    assert divergence() < 0.8 * before
    assert done == list(range(1, 21))
    assert not any(p.requires_grad for p in student.parameters())
    after = [layer.mlp.gate.e_score_correction_bias for layer in layers_of(student)]
    assert not all(torch.equal(a, b) for a, b in zip(biases, after, strict=True))

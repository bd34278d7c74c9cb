"""The residual stream is the dense model's own, and its probe is not trained on."""

import pytest
import torch

from smolseek.conversion.distill import dense_states
from smolseek.conversion.residual_stream import ResidualStream, shuffled
from tests.factories import random_ids


@pytest.mark.usefixtures("fp32")
def test_the_stream_is_the_dense_models_own(teacher):
    ids = random_ids(5, 16)
    states = teacher(ids, output_hidden_states=True).hidden_states
    stream = ResidualStream(teacher.model, ids)
    for index in range(2):
        torch.testing.assert_close(stream.hidden_BTD, states[index])
        before = stream.hidden_BTD.clone()
        stream.enter(index)
        x, out = stream.attention(torch.arange(5))
        torch.testing.assert_close(x, teacher.model.layers[index].input_layernorm(before))
        stream.pass_attention(dense_attention(stream))
        torch.testing.assert_close(stream.hidden_BTD, before + out)
        norm = teacher.model.layers[index].post_attention_layernorm
        inputs, before = norm(stream.hidden_BTD).flatten(0, 1), stream.hidden_BTD.clone()
        samples = stream.mlp_samples()
        stream.pass_mlp(stream.layer.mlp)
        for sample in samples:  # few windows serve as probe and as training text
            torch.testing.assert_close(sample.inputs_ND, inputs)
            torch.testing.assert_close(
                sample.outputs_ND, (stream.hidden_BTD - before).flatten(0, 1), rtol=1e-3, atol=1e-6
            )
            torch.testing.assert_close(sample.weight_N, 1 / stream.hidden_BTD.flatten(0, 1).square().sum(-1))
    torch.testing.assert_close(stream.final_states(), states[-1])
    torch.testing.assert_close(dense_states(teacher, ids).final_BTD, states[-1])
    assert torch.equal(stream.converted_BTD, stream.hidden_BTD), "the dense blocks stood in for the converted ones"


def dense_attention(stream):
    """The dense block that the stream stands before, in the place of a converted one."""
    return lambda x: stream.layer.self_attn(x, position_embeddings=stream.rope, attention_mask=None)[0]


@pytest.mark.usefixtures("fp32")
def test_a_block_learns_behind_the_converted_blocks_before_it(teacher):
    stream = ResidualStream(teacher.model, random_ids(5, 16))
    stream.enter(0)
    stream.pass_attention(lambda x: torch.zeros_like(x))
    stream.pass_mlp(lambda x: torch.ones_like(x))
    embedded = teacher.model.embed_tokens(random_ids(5, 16))
    torch.testing.assert_close(stream.converted_BTD, embedded + 1)
    stream.enter(1)
    x, _ = stream.attention(torch.arange(5))
    torch.testing.assert_close(x, teacher.model.layers[1].input_layernorm(embedded + 1))


def test_the_probe_is_not_trained_on(teacher):
    stream = ResidualStream(teacher.model, random_ids(140, 16))
    assert (stream.probe, stream.batch, stream.step_windows) == (128, 64, 64)
    assert ResidualStream(teacher.model, random_ids(2, 16), step_tokens=256).step_windows == 16
    stream.enter(0)
    stream.pass_attention(dense_attention(stream))
    probe, rest = stream.mlp_samples()
    assert len(probe.weight_N) == 128 * 16 and len(rest.weight_N) == 12 * 16
    assert {tuple(sorted(rows.tolist())) for rows in stream.batches(3, seed=0)} == {tuple(range(128, 140))}


def test_shuffled_takes_every_window_before_any_comes_again():
    rows = torch.cat(list(shuffled(7, 3, 7, seed=0)))
    assert len(rows) == 21
    assert all(sorted(epoch.tolist()) == list(range(7)) for epoch in rows.split(7))
    assert [len(batch) for batch in shuffled(2, 5, 3, seed=0)] == [2, 2, 2]
    assert torch.equal(rows, torch.cat(list(shuffled(7, 3, 7, seed=0))))

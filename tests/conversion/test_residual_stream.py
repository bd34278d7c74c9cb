"""The residual stream is the dense model's own, and its probe is not trained on."""

import torch

from smolseek.conversion.residual_stream import ResidualStream, shuffled
from tests.factories import random_ids


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
        stream.pass_attention()
        torch.testing.assert_close(stream.hidden_BTD, before + out)
        norm = teacher.model.layers[index].post_attention_layernorm
        for inputs in stream.mlp_inputs():  # few windows serve as probe and as training text
            torch.testing.assert_close(inputs, norm(stream.hidden_BTD).flatten(0, 1))
        stream.pass_mlp()
    torch.testing.assert_close(teacher.model.norm(stream.hidden_BTD), states[-1])


def test_the_probe_is_not_trained_on(teacher):
    stream = ResidualStream(teacher.model, random_ids(140, 16))
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

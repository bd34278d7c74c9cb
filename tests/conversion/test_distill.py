"""The end-to-end stage: nearer to the dense model, with routing biases that balance."""

import torch

from smolseek.conversion.distill import cut_beginnings, dense_states, distill, distillation_loss
from tests.factories import layers_of, random_ids, tiny_v3


def test_distillation_brings_the_logits_nearer_and_balances(teacher):
    student = tiny_v3(first_k_dense_replace=0)
    windows = random_ids(12, 16)
    trained = dict(student.named_parameters())
    biases = [layer.mlp.gate.e_score_correction_bias.clone() for layer in layers_of(student)]

    def divergence():
        with torch.no_grad():
            target, ours = teacher(windows).logits.log_softmax(-1), student(windows).log_softmax(-1)
        return float((target.exp() * (target - ours)).sum(-1).mean())

    before, done = divergence(), []
    head_VD, states = teacher.lm_head.weight, dense_states(teacher, windows)
    distill(student, head_VD, [(states, 128)], trained, steps=20, seed=0, rate=0.011, on_step=done.append)
    assert divergence() < 0.8 * before
    assert done == list(range(1, 21))
    assert not any(p.requires_grad for p in student.parameters())
    after = [layer.mlp.gate.e_score_correction_bias for layer in layers_of(student)]
    assert not all(torch.equal(a, b) for a, b in zip(biases, after, strict=True))


def test_the_loss_is_the_kl_and_the_distance_of_the_streams(teacher):
    """Both by their formulas, on what the two models say of all their layers."""
    student, ids = tiny_v3(first_k_dense_replace=0, hidden_size=32), random_ids(3, 16)
    states = dense_states(teacher, ids, layers=[0])
    with torch.no_grad():
        dense = teacher(ids, output_hidden_states=True)
        torch.testing.assert_close(states.final_BTD.float(), dense.hidden_states[-1], rtol=0.02, atol=0.1)
        torch.testing.assert_close(states.behind_BTD[0].float(), dense.hidden_states[1], rtol=0.02, atol=0.1)
        logits = student(ids)
        kl = (dense.logits.softmax(-1) * (dense.logits.log_softmax(-1) - logits.log_softmax(-1))).sum(-1).mean()
        kept = []
        handle = layers_of(student)[0].register_forward_hook(lambda _, __, out: kept.append(out))
        student(ids)
        handle.remove()
        target = dense.hidden_states[1]
        apart = torch.log(1 + (kept[0] - target).norm(dim=-1) ** 2 / target.norm(dim=-1) ** 2).mean()
        loss = distillation_loss(student, teacher.lm_head.weight, states)
    assert apart > 0.1
    torch.testing.assert_close(loss, kl + apart, rtol=0.02, atol=0)


def test_a_step_takes_windows_of_each_text(teacher):
    student, seen = tiny_v3(hidden_size=32), []
    texts = [(dense_states(teacher, random_ids(8, 16)), 3), (dense_states(teacher, random_ids(20, 4), [0]), 5)]
    hidden_states = student.hidden_states
    student.hidden_states = lambda ids: seen.append(tuple(ids.shape)) or hidden_states(ids)
    trained = dict(student.named_parameters())
    distill(student, teacher.lm_head.weight, texts, trained, steps=2, seed=0, rate=0.01, on_step=lambda done: None)
    assert seen == 2 * [(3, 16), (5, 4)]


def test_beginnings_are_pieces_of_the_windows():
    windows_BT = torch.arange(3 * 18).view(3, 18)
    pieces = cut_beginnings(windows_BT, 100, seed=0)
    wanted = {tuple(range(18 * row + at, 18 * row + at + 4)) for row in range(3) for at in (0, 4, 8, 12)}
    assert {tuple(piece) for piece in pieces.tolist()} == wanted and len(pieces) == 12
    assert len(cut_beginnings(windows_BT, 5, seed=0)) == 5

"""The end-to-end stage: nearer to the dense model, with routing biases that balance."""

import pytest
import torch

from smolseek.conversion.distill import NewStates, dense_states, distill, distillation_loss, draw, go_to_lowest
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
    batches = zip(draw([states], 128 * 16, 20, seed=0))
    distill(student, head_VD, batches, trained, steps=20, rate=0.011, on_step=done.append)
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


def test_a_step_takes_windows_of_one_length_and_beginnings(teacher):
    student, seen = tiny_v3(hidden_size=32), []
    short, long = (dense_states(teacher, random_ids(*shape)) for shape in ((8, 16), (2, 64)))
    beginnings = NewStates(teacher, random_ids(20, 4), [0])
    hidden_states = student.hidden_states
    student.hidden_states = lambda ids: seen.append(tuple(ids.shape)) or hidden_states(ids)
    trained = dict(student.named_parameters())
    batches = zip(draw([short, long], 64, 4, seed=0), draw([beginnings], 20, 4, seed=0), strict=True)
    distill(student, teacher.lm_head.weight, batches, trained, steps=4, rate=0.01, on_step=lambda done: None)
    assert sorted(seen[::2]) == [(1, 64), (1, 64), (4, 16), (4, 16)] and seen[1::2] == 4 * [(5, 4)]


def test_every_window_is_drawn_once_before_any_comes_again(teacher):
    texts = [NewStates(teacher, random_ids(*shape), []) for shape in ((6, 16), (5, 32))]
    drawn = [(text is texts[1], row) for text, rows in draw(texts, 32, 16, seed=0) for row in rows.tolist()]
    once = [(False, row) for row in range(6)] + [(True, row) for row in range(5)]
    assert sorted(drawn[:11]) == sorted(drawn[11:]) == once


def test_states_are_the_same_whether_they_are_kept_or_computed_when_they_are_met(teacher):
    ids, rows = random_ids(6, 16), torch.tensor([4, 1])
    kept, new = dense_states(teacher, ids, [0]).of(rows), NewStates(teacher, ids, [0]).of(rows)
    torch.testing.assert_close(new.final_BTD, kept.final_BTD, rtol=0.02, atol=0.1)
    torch.testing.assert_close(new.behind_BTD, kept.behind_BTD, rtol=0.02, atol=0.1)
    assert torch.equal(new.ids_BT, kept.ids_BT)


@pytest.mark.parametrize(
    ("best", "before", "place", "tries"),
    [
        (0.9, 0.81, 1.0, [1, 0.75]),
        (0.8, 0.64, 0.75, [1, 0.75, 0.5]),
        (0.2, 0.04, 0.25, [1, 0.75, 0.5, 0.25]),
        (0.1, 0.01, 0.0, [1, 0.75, 0.5, 0.25]),
        (float("nan"), 0.01, 0.0, [1]),
    ],
)
def test_of_the_way_the_best_point_stays(best, before, place, tries):
    """The divergence is a parabola along the way, `best` its lowest point and `before` what the start has."""
    start, end = torch.randn(7), torch.randn(7)
    tensor, tried = end.clone(), []

    def judged():
        share = float(((tensor - start) / (end - start)).mean())
        tried.append(round(share, 4))
        return (share - best) ** 2

    assert go_to_lowest({"w": tensor}, {"w": start}, judged, before) == (place > 0)
    torch.testing.assert_close(tensor, start + place * (end - start))
    assert tried == tries
    assert place > 0 or torch.equal(tensor, start)

"""The end-to-end stage: nearer to the dense model, with routing biases that balance."""

import torch

from smolseek.conversion.distill import distill, final_states
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
    head_VD, states_BTD = teacher.lm_head.weight, final_states(teacher, windows)
    distill(student, head_VD, windows, states_BTD, trained, steps=20, seed=0, rate=0.011, on_step=done.append)
    assert divergence() < 0.8 * before
    assert done == list(range(1, 21))
    assert not any(p.requires_grad for p in student.parameters())
    after = [layer.mlp.gate.e_score_correction_bias for layer in layers_of(student)]
    assert not all(torch.equal(a, b) for a, b in zip(biases, after, strict=True))

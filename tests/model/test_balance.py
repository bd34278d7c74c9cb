import pytest
import torch
from torch import nn

from smolseek.model.balance import max_violation, take_expert_counts, update_biases
from tests.factories import layers_of, random_ids, tiny_v3


def test_counts_are_taken_once_per_layer_with_experts() -> None:
    model = tiny_v3()
    take_expert_counts(model)
    with torch.no_grad():
        model(random_ids(2, 8))
        model(random_ids(2, 8))
    counts = take_expert_counts(model)
    assert [layer for layer, _ in counts] == [1, 2]
    assert all(counts_E.sum() == 2 * 2 * 8 * 3 and counts_E.dtype == torch.int64 for _, counts_E in counts)
    assert all((counts_E == 0).all() for _, counts_E in take_expert_counts(model))
    assert take_expert_counts(nn.Linear(2, 2)) == []


def test_one_update_is_the_papers_and_mean_centred() -> None:
    model = tiny_v3()
    bias = layers_of(model)[1].mlp.gate.e_score_correction_bias
    bias.zero_()
    untouched = layers_of(model)[2].mlp.gate.e_score_correction_bias.clone()
    update_biases(model, [(1, torch.tensor([9, 1, 1, 1, 3, 3, 3, 3]))], 0.1)  # mean 3
    steps = torch.tensor([-1.0, 1, 1, 1, 0, 0, 0, 0])
    torch.testing.assert_close(bias, 0.1 * (steps - steps.mean()))
    assert torch.equal(layers_of(model)[2].mlp.gate.e_score_correction_bias, untouched)


def test_max_violation() -> None:
    assert max_violation(torch.tensor([4, 4, 4])) == 0
    assert max_violation(torch.tensor([6, 3, 3])) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="no token"):
        max_violation(torch.zeros(3, dtype=torch.int64))


def test_a_badly_skewed_router_is_brought_into_balance() -> None:
    model, ids = tiny_v3(), random_ids(16, 64)
    for layer in layers_of(model)[1:]:
        layer.mlp.gate.e_score_correction_bias.copy_(torch.linspace(-1, 1, 8))
    take_expert_counts(model)
    violations = []
    with torch.no_grad():
        for step in range(120):
            model(ids)
            counts = take_expert_counts(model)
            violations.append(max(max_violation(counts_E) for _, counts_E in counts))
            update_biases(model, counts, 0.03 * 0.97**step)
    assert violations[0] > 1
    assert violations[-1] < 0.2

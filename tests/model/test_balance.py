import pytest
import torch
from torch import nn

from smolseek.model.balance import BalanceRule, max_violation, next_bias, take_expert_counts, update_biases
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


@pytest.mark.parametrize("rule, speed", [("sign", 0.03), ("proportional", 0.1)])
@pytest.mark.parametrize("groups", [1, 4])
def test_every_rule_balances_a_skewed_router(rule: BalanceRule, speed: float, groups: int) -> None:
    """Without groups; and like an upcycled model: each token takes one whole group, two experts with equal rows."""
    grouped = {"n_group": 4, "topk_group": 1, "num_experts_per_tok": 2} if groups > 1 else {}
    model, ids = tiny_v3(**grouped).train(), random_ids(8, 64)
    for layer in layers_of(model)[1:]:
        gate = layer.mlp.gate
        gate.e_score_correction_bias.copy_(torch.linspace(-0.5, 0.5, 8))
        if groups > 1:
            gate.weight.data = gate.weight.data[::2].repeat_interleave(2, dim=0)
            gate.e_score_correction_bias.copy_(torch.linspace(-0.5, 0.5, 4).repeat_interleave(2))
    take_expert_counts(model)
    violations = []
    with torch.no_grad():
        for step in range(60):
            for part in ids.split(4):
                model(part)
            counts = take_expert_counts(model)
            violations.append(max(max_violation(counts_E) for _, counts_E in counts))
            update_biases(model, counts, speed * 0.97**step, rule)
    assert violations[0] > 0.6
    assert violations[-1] < 0.15
    if groups > 1:
        bias = layers_of(model)[1].mlp.gate.e_score_correction_bias
        torch.testing.assert_close(bias[::2], bias[1::2])


def test_the_rules_by_hand() -> None:
    bias, counts = torch.tensor([0.5, 0.0, -0.5]), torch.tensor([6, 3, 0])
    torch.testing.assert_close(next_bias(bias, counts, 0.1), torch.tensor([0.4, 0.0, -0.4]))
    torch.testing.assert_close(next_bias(bias, 2 * counts, 0.2, "proportional"), torch.tensor([0.3, 0.0, -0.3]))


def test_at_speed_zero_nothing_moves() -> None:
    model = tiny_v3()
    bias = layers_of(model)[1].mlp.gate.e_score_correction_bias
    bias.add_(1)
    before = bias.clone()
    update_biases(model, [(1, torch.arange(8))], 0.0)
    assert torch.equal(bias, before)

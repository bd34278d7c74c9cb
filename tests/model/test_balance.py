import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import nn

from smolseek.config import TrainSettings
from smolseek.model.balance import (
    BalanceRule,
    balance_speed,
    copies_of,
    describe_load,
    expert_weights,
    max_violation,
    proportional_bias,
    recorded_choices,
    routing_information,
    set_balance,
    signed_bias,
    take_expert_counts,
    update_biases,
    weights_apart,
)
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


@pytest.mark.parametrize("rule, speed", [("sign", 0.03), ("proportional", 0.1), ("quantile", 0.3)])
@pytest.mark.parametrize("groups", [1, 4])
def test_every_rule_balances_a_skewed_router(rule: BalanceRule, speed: float, groups: int) -> None:
    """Ungrouped and, as in an upcycled model, one whole group of two experts a token, of tied rows."""
    grouped = {"n_group": 4, "topk_group": 1, "num_experts_per_tok": 2} if groups > 1 else {}
    model, ids = tiny_v3(**grouped).train(), random_ids(8, 64)
    for layer in layers_of(model)[1:]:
        gate = layer.mlp.gate
        gate.e_score_correction_bias.copy_(torch.linspace(-0.5, 0.5, 8))
        if groups > 1:
            gate.weight.data = gate.weight.data[::2].repeat_interleave(2, dim=0)
            gate.e_score_correction_bias.copy_(torch.linspace(-0.5, 0.5, 4).repeat_interleave(2))
    set_balance(model, TrainSettings(balance_rule=rule))
    take_expert_counts(model)
    violations = []
    with torch.no_grad():
        for step in range(60):
            for part in ids.split(4):
                model(part)
            counts = take_expert_counts(model)
            violations.append(max(max_violation(counts_E) for _, counts_E in counts))
            update_biases(model, counts, speed * (1 if rule == "quantile" else 0.97**step), rule)
    assert violations[0] > 0.6
    assert violations[-1] < 0.15
    if groups > 1:
        bias = layers_of(model)[1].mlp.gate.e_score_correction_bias
        torch.testing.assert_close(bias[::2], bias[1::2])


def test_the_rules_by_hand() -> None:
    bias, counts = torch.tensor([0.5, 0.0, -0.5]), torch.tensor([6, 3, 0])
    torch.testing.assert_close(signed_bias(bias, counts, 0.1), torch.tensor([0.4, 0.0, -0.4]))
    torch.testing.assert_close(proportional_bias(bias, 2 * counts, 0.2), torch.tensor([0.3, 0.0, -0.3]))


def test_the_sign_rules_speed_falls_with_the_learning_rate() -> None:
    settings = TrainSettings(steps=10, balance_update_speed=0.5)
    assert [balance_speed(9, settings, decay) for decay in (1.0, 0.5, 0.0)] == pytest.approx([0.5, 0.3, 0.1])
    for rule in ("proportional", "quantile"):
        assert balance_speed(9, dataclasses.replace(settings, balance_rule=rule), 0.0) == 0.5


def test_a_frozen_bias_does_not_move() -> None:
    settings = TrainSettings(steps=10, balance_freeze_share=0.3, balance_rule="proportional")
    assert [balance_speed(step, settings, 0.5) for step in (0, 6, 7, 9)] == [1e-3, 1e-3, 0, 0]
    model = tiny_v3()
    bias = layers_of(model)[1].mlp.gate.e_score_correction_bias
    bias.add_(1)
    before = bias.clone()
    update_biases(model, [(1, torch.arange(8))], 0.0)
    assert torch.equal(bias, before)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"balance_freeze_share": 1.5}, r"train\.balance_freeze_share 1\.5"),
        ({"balance_loss_weight": -1.0}, r"train\.balance_loss_weight -1\.0"),
        ({"balance_rule": "quantile"}, "some experts of some groups"),
    ],
)
def test_settings_that_cannot_balance(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        set_balance(tiny_v3(n_group=4, topk_group=2), TrainSettings(**changes))


def test_the_loss_weighs_the_global_batch() -> None:
    model = tiny_v3()
    set_balance(model, TrainSettings(balance_loss_weight=0.4, gradient_accumulation=4, balance_loss="batch"))
    gate = layers_of(model)[1].mlp.gate
    gate.quantile_sums.fill_(1e14)
    set_balance(model, TrainSettings(balance_loss_weight=0.4, gradient_accumulation=4, balance_loss="batch"))
    assert (gate.quantile_sums == 0).all(), "a loaded model has whatever stood in memory"
    assert gate.loss_weight == pytest.approx(0.1) and gate.loss_over_batch and not gate.gathers_quantiles
    set_balance(nn.Linear(2, 2), TrainSettings())


def test_load_for_the_metrics() -> None:
    assert describe_load([]) == {}
    expected = {"maxvio": {"3": 1.0}, "load": {"3": [0.6667, 0.3333, 0.0]}}
    assert describe_load([(3, torch.tensor([4, 2, 0]))]) == expected


def test_weights_apart() -> None:
    copy = torch.randn(500)
    assert weights_apart(torch.stack([copy, copy, copy])) < 1e-6
    assert weights_apart(torch.randn(6, 5000)) == pytest.approx(2**0.5, rel=0.02)
    noisy = copy + 0.1 * torch.randn(40, 500)
    pairs = [(a - b).square().sum() for i, a in enumerate(noisy) for b in noisy[:i]]
    expected = (torch.stack(pairs).mean() / noisy.square().sum(1).mean()).sqrt()
    assert weights_apart(noisy) == pytest.approx(float(expected), rel=1e-4)


def test_routing_information() -> None:
    by_token = torch.zeros(40, 4).scatter_(1, (torch.arange(40) % 4)[:, None], 50.0)
    assert routing_information(by_token) == pytest.approx(1, abs=0.03)
    chance = torch.distributions.Multinomial(60, torch.ones(4)).sample((200,))
    assert routing_information(chance) < 0.01
    assert routing_information(torch.tensor([[5.0, 0.0], [7.0, 0.0]])) == 0
    mixed = torch.tensor([[300.0, 100.0], [100.0, 300.0]])
    joint = mixed / mixed.sum()
    plain = float((joint * (joint / 0.25).log()).sum()) / math.log(2)
    assert routing_information(mixed) == pytest.approx(plain, abs=0.002)


def test_copies_are_what_is_taken_whole() -> None:
    grouped = tiny_v3(n_group=4, topk_group=2, num_experts_per_tok=4)
    with recorded_choices(grouped) as choices, torch.no_grad():
        grouped(random_ids(2, 5))
        grouped(random_ids(1, 5))
    assert [part.shape for part in choices[1]] == [(10, 2), (5, 2)] and list(choices) == [1, 2]
    assert choices[1][0].max() < 4 and (choices[1][0][:, 0] < choices[1][0][:, 1]).all()
    assert copies_of(layers_of(grouped)[1].mlp.gate) == 4
    assert copies_of(layers_of(tiny_v3(n_group=4, topk_group=2))[1].mlp.gate) == 8
    experts = layers_of(grouped)[1].mlp.experts
    with torch.no_grad():
        for stack in (experts.gate_up_proj, experts.down_proj):
            stack.copy_(stack[:2].repeat(4, 1, 1))
    assert expert_weights(grouped)[1] < 1e-6 and expert_weights(grouped)[2] > 1

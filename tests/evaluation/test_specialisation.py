import math

import pytest
import torch

from smolseek.evaluation import measure_specialisation
from smolseek.evaluation.specialisation import (
    compared_parts,
    layer_weight_distances,
    recorded_choices,
    routing_information,
    weight_distance,
)
from smolseek.model import StockModel
from tests.factories import layers_of, random_ids, tiny_llama, tiny_v3


def test_specialisation_is_measured_for_every_expert_layer():
    ids = random_ids(1, 150)[0]
    for groups, experts in ((1, 3), (4, 2)):
        model = tiny_v3(n_group=groups, topk_group=1, num_experts_per_tok=experts)
        found = measure_specialisation(model, ids)
        assert set(found) == {"weights", "routing"}
        assert all(set(by_layer) == {"1", "2"} for by_layer in found.values())
        assert found["weights"]["1"] == pytest.approx(2**0.5, rel=0.05)
        assert 0 <= found["routing"]["1"] <= 1
    assert measure_specialisation(StockModel(tiny_llama()), ids) == {}


def test_routing_by_the_token_alone_is_fully_explained():
    """Without attention, the input of the first expert layer depends on the token alone."""
    model, ids = tiny_v3(first_k_dense_replace=0), random_ids(1, 4000)[0]
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    for router in (layer.mlp.gate for layer in model.model.layers):
        router.num_experts_per_tok = 1
    assert min(measure_specialisation(model, ids)["routing"].values()) > 0.97


def test_weight_distance():
    copy = torch.randn(500)
    assert weight_distance(torch.stack([copy, copy, copy])) < 1e-6
    assert weight_distance(torch.randn(6, 5000)) == pytest.approx(2**0.5, rel=0.02)
    noisy = copy + 0.1 * torch.randn(40, 500)
    pairs = [(a - b).square().sum() for i, a in enumerate(noisy) for b in noisy[:i]]
    expected = (torch.stack(pairs).mean() / noisy.square().sum(1).mean()).sqrt()
    assert weight_distance(noisy) == pytest.approx(float(expected), rel=1e-4)


def test_routing_information():
    by_token = torch.zeros(40, 4).scatter_(1, (torch.arange(40) % 4)[:, None], 50.0)
    assert routing_information(by_token) == pytest.approx(1, abs=0.03)
    chance = torch.distributions.Multinomial(60, torch.ones(4)).sample((200,))
    assert routing_information(chance) < 0.01
    assert routing_information(torch.tensor([[5.0, 0.0], [7.0, 0.0]])) == 0
    mixed = torch.tensor([[300.0, 100.0], [100.0, 300.0]])
    joint = mixed / mixed.sum()
    plain = float((joint * (joint / 0.25).log()).sum()) / math.log(2)
    assert routing_information(mixed) == pytest.approx(plain, abs=0.002)


def test_groups_are_compared_where_they_are_taken_whole():
    grouped = tiny_v3(n_group=4, topk_group=2, num_experts_per_tok=4)
    with recorded_choices(grouped) as choices, torch.no_grad():
        grouped(random_ids(2, 5))
        grouped(random_ids(1, 5))
    assert [part.shape for part in choices[1]] == [(10, 2), (5, 2)] and list(choices) == [1, 2]
    assert choices[1][0].max() < 4 and (choices[1][0][:, 0] < choices[1][0][:, 1]).all()
    assert compared_parts(layers_of(grouped)[1].mlp.gate) == 4
    assert compared_parts(layers_of(tiny_v3(n_group=4, topk_group=2))[1].mlp.gate) == 8
    experts = layers_of(grouped)[1].mlp.experts
    with torch.no_grad():
        for stack in (experts.gate_up_proj, experts.down_proj):
            stack.copy_(stack[:2].repeat(4, 1, 1))
    assert layer_weight_distances(grouped)[1] < 1e-6 and layer_weight_distances(grouped)[2] > 1

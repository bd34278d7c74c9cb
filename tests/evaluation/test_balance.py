import pytest
import torch

from smolseek.evaluation import measure_specialisation
from smolseek.model import StockModel
from tests.factories import random_ids, tiny_llama, tiny_v3


def test_specialisation_is_said_for_every_expert_layer():
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
    """Without attention the first expert layer sees nothing but the token."""
    model, ids = tiny_v3(first_k_dense_replace=0), random_ids(1, 4000)[0]
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    for router in (layer.mlp.gate for layer in model.model.layers):
        router.num_experts_per_tok = 1
    assert min(measure_specialisation(model, ids)["routing"].values()) > 0.97

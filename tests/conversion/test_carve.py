"""Carving: every neuron is kept once, the stock block computes what was fitted, every stage lowers the error."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

from smolseek.conversion.carve import (
    apply_carving,
    balanced_clusters,
    carve,
    fit_router,
    load_carving,
    refine_carving,
    relative_error,
    split,
)
from smolseek.model.balance import max_violation
from smolseek.model.experts import MixtureOfExperts
from tests.factories import tiny_v3_config

HIDDEN, NEURONS, TOPICS = 32, 96, 6
CONFIG = {"n_shared_experts": 2, "n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 12}


def dense_mlp(seed=0, neurons=NEURONS):
    """Returns a SwiGLU whose neurons respond to one topic each, and inputs that have one topic each."""
    g = torch.Generator().manual_seed(seed)
    topics = torch.randn(TOPICS, HIDDEN, generator=g)
    owner = torch.arange(neurons) % TOPICS
    weights = {
        "gate_proj": topics[owner] + 0.3 * torch.randn(neurons, HIDDEN, generator=g),
        "up_proj": torch.randn(neurons, HIDDEN, generator=g),
        "down_proj": torch.randn(HIDDEN, neurons, generator=g),
    }
    weights["gate_proj"][: neurons // 4] = 1 + torch.randn(neurons // 4, HIDDEN, generator=g)
    picked = torch.randint(TOPICS, (2048,), generator=g)
    return weights, 0.5 + topics[picked] + 0.5 * torch.randn(2048, HIDDEN, generator=g)


@given(st.integers(0, 3), st.integers(1, 6), st.integers(1, 9), st.integers(0, 8), st.integers(0, 999))
@settings(max_examples=25, deadline=None)
def test_a_split_holds_every_neuron_once(shared, routed, width, silent, seed):
    neurons = max((shared + routed) * width - silent, shared * width + 1, 2)
    if neurons > (shared + routed) * width:
        return
    g = torch.Generator().manual_seed(seed)
    activations, down = torch.randn(20, neurons, generator=g), torch.randn(5, neurons, generator=g)
    parts = split(activations, down, shared, routed, width)
    assert len(parts) == shared + routed and all(len(part) <= width for part in parts)
    assert sorted(neuron for part in parts for neuron in part) == list(range(neurons))
    assert all(len(part) == width for part in parts[:shared])


def test_clusters_find_what_belongs_together():
    g = torch.Generator().manual_seed(0)
    centres = torch.nn.functional.normalize(torch.randn(4, 30, generator=g), dim=1)
    owner = torch.arange(4).repeat(8)
    points = torch.nn.functional.normalize(centres[owner] + 0.05 * torch.randn(32, 30, generator=g), dim=1)
    assigned = balanced_clusters(points, 4)
    assert torch.bincount(assigned).tolist() == [8] * 4
    assert all(len(set(assigned[owner == topic].tolist())) == 1 for topic in range(4))


def test_the_router_learns_a_linear_oracle():
    g = torch.Generator().manual_seed(0)
    inputs, rows = 1 + torch.randn(4096, HIDDEN, generator=g), torch.randn(6, HIDDEN, generator=g)
    norms = (inputs - inputs.mean(0)) @ rows.T + 10
    fitted = fit_router(inputs, norms, 2)
    logits = (inputs - inputs.mean(0)) @ fitted.T
    assert float(logits.std()) == pytest.approx(0.1, rel=0.01)
    best = norms.topk(2, dim=1).indices
    found = logits.topk(2, dim=1).indices
    hits = (best[:, :, None] == found[:, None, :]).any(-1).float().mean()
    assert float(hits) > 0.7  # chance gives a third


@pytest.mark.parametrize("neurons", [NEURONS, NEURONS - 3], ids=["full", "silent places"])
def test_stock_blocks_compute_what_was_carved(neurons):
    """Our block and transformers'."""
    weights, inputs = dense_mlp(neurons=neurons)
    carving = refine_carving(carve(weights, inputs, CONFIG), weights, inputs, 2, steps=5, generator=torch.Generator())
    expected = apply_carving(carving, inputs[:64], 2)[0]
    config = tiny_v3_config(hidden_size=HIDDEN, routed_scaling_factor=2.0, norm_topk_prob=True, **CONFIG)
    ours = MixtureOfExperts(config)
    load_carving(ours, carving)
    assert ours.shared_experts.gate_proj.weight.shape == (24, HIDDEN)
    stock = DeepseekV3MoE(config)
    stock.load_state_dict(ours.state_dict())
    rounding = 1e-6 * expected.abs().max().item()  # fp32 sums of terms up to 4,000
    for block in (ours, stock):
        with torch.no_grad():
            torch.testing.assert_close(block(inputs[None, :64])[0], expected, rtol=1e-4, atol=rounding)


def test_all_experts_chosen_is_the_dense_mlp():
    """Then every expert weighs nearly 1, and the refit corrects the difference."""
    weights, inputs = dense_mlp()
    everything = CONFIG | {"num_experts_per_tok": 6}
    assert relative_error(carve(weights, inputs, everything), weights, inputs, 6) < 1e-3


def test_each_stage_lowers_the_error_on_fresh_tokens_and_keeps_the_balance():
    weights, inputs = dense_mlp()
    seen, fresh = inputs[:1536], inputs[1536:]
    start = carve(weights, seen, CONFIG)
    refined = refine_carving(
        start, weights, seen, 2, steps=150, generator=torch.Generator().manual_seed(0), batch_tokens=256
    )
    shuffled = start._replace(rows_ED=start.rows_ED.roll(1, dims=0))
    errors = [relative_error(c, weights, fresh, 2) for c in (shuffled, start, refined)]
    assert errors[0] > 10 * errors[1] > 13 * errors[2]
    assert max_violation(apply_carving(refined, fresh, 2)[1]) < 0.5


def test_refinement_repeats_with_the_seed_and_leaves_its_start_alone():
    weights, inputs = dense_mlp()
    start = carve(weights, inputs, CONFIG)
    kept = [tensor.clone() for tensor in start]
    runs = [
        refine_carving(start, weights, inputs, 2, steps=4, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs[:2], strict=True))
    assert not torch.equal(runs[0].rows_ED, runs[2].rows_ED)
    assert all(torch.equal(a, b) for a, b in zip(start, kept, strict=True))
    assert not any(tensor.requires_grad for tensor in runs[0])

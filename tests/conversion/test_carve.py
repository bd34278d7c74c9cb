"""Carving: every neuron is kept once, the stock block computes what was fitted, every stage lowers the error."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

from smolseek.conversion.carve import (
    MlpSample,
    apply_carving,
    balanced_clusters,
    carve,
    carving_loss,
    error_weights,
    fit_router,
    load_carving,
    move_neurons,
    refine_carving,
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
    return weights, sample_of(weights, 0.5 + topics[picked] + 0.5 * torch.randn(2048, HIDDEN, generator=g))


def sample_of(weights, inputs):
    """Returns what the dense MLP makes of these inputs, all tokens alike."""
    hidden = torch.nn.functional.silu(inputs @ weights["gate_proj"].T) * (inputs @ weights["up_proj"].T)
    return MlpSample(inputs, hidden @ weights["down_proj"].T, torch.ones(len(inputs)))


def error_of(carving, sample, chosen):
    return float(carving_loss(carving, sample, chosen)[0])


@given(st.integers(0, 3), st.integers(2, 6), st.integers(1, 9), st.integers(0, 8), st.integers(0, 999))
@settings(max_examples=25, deadline=None)
def test_a_split_holds_every_neuron_once(shared, routed, width, silent, seed):
    """Shared experts are no wider than the others, though all are padded: else a token would meet more neurons."""
    neurons = (shared + routed) * width - min(silent, width - 1)
    g = torch.Generator().manual_seed(seed)
    activations, down = torch.randn(20, neurons, generator=g), torch.randn(5, neurons, generator=g)
    parts = split(activations, down, shared, routed)
    assert len(parts) == shared + routed and all(len(part) <= width for part in parts)
    assert sorted(neuron for part in parts for neuron in part) == list(range(neurons))
    assert all(len(part) == -(-neurons // (shared + routed)) for part in parts[:shared])
    assert all(parts)


def test_clusters_find_what_belongs_together():
    g = torch.Generator().manual_seed(0)
    centres = torch.nn.functional.normalize(torch.randn(4, 30, generator=g), dim=1)
    owner = torch.arange(4).repeat(8)
    points = torch.nn.functional.normalize(centres[owner] + 0.05 * torch.randn(32, 30, generator=g), dim=1)
    assigned = balanced_clusters(points, 4)
    assert torch.bincount(assigned).tolist() == [8] * 4
    assert all(len(set(assigned[owner == topic].tolist())) == 1 for topic in range(4))


def test_neurons_move_to_the_expert_that_keeps_them():
    """Topics choose experts; a neuron that fires in one topic belongs to the expert that the topic meets."""
    g = torch.Generator().manual_seed(0)
    topics = torch.randint(3, (60,), generator=g)
    mask = torch.nn.functional.one_hot(topics, 3).float()
    fires = torch.arange(9) % 3
    energy = 0.1 + (topics[:, None] == fires).float()
    moved = move_neurons([[0, 1, 2], [3, 4, 5], [6, 7, 8]], energy, mask)
    assert moved == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]


def test_a_sink_does_not_outweigh_other_tokens():
    """Nor does a token of nothing."""
    behind = torch.ones(5, 4)
    behind[1] *= 1000
    behind[2] = 0
    weight = error_weights(behind)
    error = behind.square().sum(-1) * weight
    assert torch.allclose(error[[0, 1, 3, 4]], torch.ones(4)) and torch.isfinite(weight).all()
    assert not torch.isnan(error_weights(torch.zeros(3, 4))).any()


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
    weights, sample = dense_mlp(neurons=neurons)
    carving = refine_carving(
        carve(weights, sample, CONFIG), sample, 2, steps=5, generator=torch.Generator(), batch_tokens=256
    )
    inputs = sample.inputs_ND
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
    weights, sample = dense_mlp()
    everything = CONFIG | {"num_experts_per_tok": 6}
    assert error_of(carve(weights, sample, everything), sample, 6) < 1e-3


def test_each_stage_lowers_the_error_on_fresh_tokens_and_keeps_the_balance():
    weights, sample = dense_mlp()
    seen, fresh = sample.at(slice(1536)), sample.at(slice(1536, None))
    start = carve(weights, seen, CONFIG)
    generator = torch.Generator().manual_seed(0)
    refined = refine_carving(start, seen, 2, steps=150, generator=generator, batch_tokens=256)
    shuffled = start._replace(rows_ED=start.rows_ED.roll(1, dims=0))
    errors = [error_of(c, fresh, 2) for c in (shuffled, start, refined)]
    assert errors[0] > 10 * errors[1] > 13 * errors[2]
    assert max_violation(apply_carving(refined, fresh.inputs_ND, 2)[1]) < 0.5


def test_refinement_repeats_with_the_seed_and_leaves_its_start_alone():
    weights, sample = dense_mlp()
    start = carve(weights, sample, CONFIG)
    kept = [tensor.clone() for tensor in start]
    runs = [
        refine_carving(start, sample, 2, steps=4, generator=torch.Generator().manual_seed(seed), batch_tokens=256)
        for seed in (0, 0, 1)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs[:2], strict=True))
    assert not torch.equal(runs[0].rows_ED, runs[2].rows_ED)
    assert all(torch.equal(a, b) for a, b in zip(start, kept, strict=True))
    assert not any(tensor.requires_grad for tensor in runs[0])

import itertools

import pytest
import torch
from torch import nn

from smolseek.config import TrainSettings
from smolseek.model import StockModel
from smolseek.training.optimizer import (
    GROUPS,
    build_optimizers,
    choose_trained,
    decay,
    learning_rate,
    weight_group,
)
from tests.factories import tiny_llama, tiny_v3


def test_warm_up_then_cosine_to_the_final_share():
    settings = TrainSettings(steps=101, warmup_steps=10, learning_rate=1.0, final_learning_rate_share=0.1)
    rates = [learning_rate(step, settings) for step in range(101)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == 1.0
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert 0.1 <= rates[-1] < 0.101
    assert [decay(step, settings) for step in (0, 9, 10, 50)] == [1.0, 1.0, 1.0, rates[50]]


def test_warm_up_stable_decay():
    settings = TrainSettings(steps=100, warmup_steps=10, learning_rate=1.0, schedule="wsd", decay_share=0.2)
    rates = [learning_rate(step, settings) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert set(rates[10:81]) == {1.0}
    assert rates[80:] == pytest.approx([(100 - step) / 20 for step in range(80, 100)])


def names_of(model, optimizer):
    """Returns the names of the weights that an optimizer moves, and of those that decay."""
    by_id = {id(p): name for name, p in model.named_parameters()}
    groups = [({by_id[id(p)] for p in group["params"]}, group["weight_decay"]) for group in optimizer.param_groups]
    every = set().union(*(names for names, _ in groups))
    return every, set().union(*(names for names, decay in groups if decay))


@pytest.mark.parametrize("model", [tiny_v3(q_lora_rank=16), StockModel(tiny_llama())], ids=["v3", "llama"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_weight_has_one_optimizer_and_only_matrices_decay(model, optimizer):
    optimizers = build_optimizers(model, TrainSettings(optimizer=optimizer))
    moved = [names_of(model, each) for each in optimizers]
    shapes = {name: p.dim() for name, p in model.named_parameters()}
    assert sorted(name for names, _ in moved for name in names) == sorted(shapes)
    assert {name for _, decayed in moved for name in decayed} == {name for name, dim in shapes.items() if dim > 1}
    if optimizer == "muon":
        by_muon, rest = moved[0][0], moved[1][0]
        assert all(".self_attn." in name or ".mlp." in name for name in by_muon)
        assert not any(name.endswith(("gate.weight", "norm.weight")) for name in by_muon)
        assert any("embed_tokens" in name for name in rest)


def test_muon_updates_each_expert_like_a_matrix_of_its_own():
    model = tiny_v3()
    experts = model.model.layers[1].mlp.experts
    lone: list[list[nn.Parameter]] = [[], []]
    for part in experts.gate_up_proj.detach().unbind():
        lone[0] += [nn.Parameter(half.clone()) for half in part.chunk(2)]
    lone[1] = [nn.Parameter(part.clone()) for part in experts.down_proj.detach().unbind()]
    flat = [*lone[0], *lone[1]]
    muon = build_optimizers(model, TrainSettings(optimizer="muon", learning_rate=0.01, weight_decay=0.1))[0]
    theirs = torch.optim.Muon(flat, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    generator = torch.Generator().manual_seed(0)
    for step in range(3):
        experts.gate_up_proj.grad = torch.randn(experts.gate_up_proj.shape, generator=generator)
        experts.down_proj.grad = torch.randn(experts.down_proj.shape, generator=generator)
        if step == 1:
            experts.down_proj.grad[3] = 0  # an expert that received no token
        halves = [half for part in experts.gate_up_proj.grad.unbind() for half in part.chunk(2)]
        for p, grad in zip(flat, [*halves, *experts.down_proj.grad.unbind()], strict=True):
            p.grad = grad.clone()
        muon.step()
        theirs.step()
        muon.zero_grad()
        assert experts.gate_up_proj.grad is None
    ours = [half for part in experts.gate_up_proj.detach().unbind() for half in part.chunk(2)]
    for mine, p in zip([*ours, *experts.down_proj.detach().unbind()], flat, strict=True):
        torch.testing.assert_close(mine, p.detach(), rtol=0, atol=5e-4)  # torch's Muon iterates in bf16; a step is 2e-3


def test_groups_of_weights_have_their_own_rates():
    model = tiny_v3()
    groups = {weight_group(name, p) for name, p in model.named_parameters()}
    assert groups == set(GROUPS)
    (optimizer,) = build_optimizers(model, TrainSettings(learning_rate_factors={"router": 5.0, "norms": 0.5}))
    factors = {id(p): group["factor"] for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        assert factors[id(p)] == {"router": 5.0, "norms": 0.5}.get(weight_group(name, p), 1.0)


@pytest.mark.parametrize("trains", ["all", "attention", "experts"])
def test_only_what_is_chosen_trains(trains):
    model = tiny_v3()
    choose_trained(model, trains)
    chosen = {name for name, p in model.named_parameters() if p.requires_grad}
    part = {"all": "", "attention": ".self_attn.", "experts": ".mlp."}[trains]
    assert chosen == {name for name, _ in model.named_parameters() if part in name}
    moved = [names_of(model, each)[0] for each in build_optimizers(model, TrainSettings(optimizer="muon"))]
    assert set().union(*moved) == chosen

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from smolseek.model.balance_loss import balance_loss, with_loss
from smolseek.model.experts import MixtureOfExperts
from tests.factories import enliven, tiny_v3_config


def training_moe(weight: float, over_batch: bool = False, **overrides: object) -> MixtureOfExperts:
    moe = MixtureOfExperts(tiny_v3_config(**overrides)).train()
    enliven(moe)
    moe.gate.balance_loss_weight, moe.gate.balance_loss_over_batch = weight, over_batch
    return moe


def loss_by_hand(moe: MixtureOfExperts, x_BTD: torch.Tensor) -> torch.Tensor:
    """Returns DeepSeek-V3's equations 17 to 20, one sequence and one expert at a time."""
    experts, chosen = moe.gate.num_experts, moe.gate.num_experts_per_tok
    losses = []
    for x_TD in x_BTD:
        scores = torch.sigmoid(x_TD @ moe.gate.weight.T)
        tokens = len(scores)
        loss = torch.zeros(())
        for expert in range(experts):
            hits = sum(int(expert in row.topk(chosen).indices.tolist()) for row in scores)
            loss = loss + experts / (chosen * tokens) * hits * (scores[:, expert] / scores.sum(1)).sum() / tokens
        losses.append(loss)
    return torch.stack(losses).mean()


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("over_batch", [False, True])
def test_the_loss_and_its_gradients_are_the_papers(over_batch: bool, checkpointed: bool) -> None:
    plain, balanced = training_moe(0.0), training_moe(0.3, over_batch)
    x = torch.randn(4, 7, 40, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = x.detach().clone().requires_grad_(True)
    sequences = y.view(1, -1, 40) if over_batch else y
    (plain(y).square().sum() + 0.3 * loss_by_hand(plain, sequences)).backward()
    out = checkpoint(balanced, x, use_reentrant=False) if checkpointed else balanced(x)
    assert torch.equal(out, plain(y))
    out.square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-5)
    for (name, mine), (_, wanted) in zip(balanced.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(mine.grad, wanted.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_the_bias_takes_no_part_in_the_loss() -> None:
    moe, x = training_moe(1.0), torch.randn(2, 6, 40)
    grads = []
    for bias in (0.0, 5.0):
        moe.gate.e_score_correction_bias.zero_()[0] = bias
        scores = torch.sigmoid(x.view(-1, 40) @ moe.gate.weight.T)
        loss = balance_loss(scores, moe.gate.choose(scores.detach()), 2)
        grads.append(torch.autograd.grad(loss, moe.gate.weight)[0])
    assert torch.equal(*grads)


def test_there_is_no_loss_outside_training() -> None:
    balanced, plain, x = training_moe(1.0).eval(), training_moe(0.0).eval(), torch.randn(2, 6, 40)
    for moe in (balanced, plain):
        moe(x).sum().backward()
    assert torch.equal(balanced.gate.weight.grad, plain.gate.weight.grad)


def test_processes_that_sum_their_counts_have_the_loss_of_the_whole_batch() -> None:
    scores = torch.rand(12, 5, requires_grad=True)
    indices = scores.detach().topk(2).indices
    counts = torch.bincount(indices.flatten(), minlength=5)[None].float()
    shares = zip(scores.chunk(2), indices.chunk(2), strict=True)
    mean = torch.stack([balance_loss(*share, 1, lambda own: counts) for share in shares]).mean()
    whole = balance_loss(scores, indices, 1)
    torch.testing.assert_close(mean, whole)
    torch.testing.assert_close(torch.autograd.grad(mean, scores), torch.autograd.grad(whole, scores))


@pytest.mark.parametrize("over_batch", [False, True])
def test_only_the_loss_over_the_batch_asks_other_processes(over_batch: bool) -> None:
    moe, asked = training_moe(0.3, over_batch), []
    moe.gate.sum_counts = lambda own: asked.append(own) or own
    moe(torch.randn(2, 6, 40))
    assert len(asked) == over_batch


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(1, 4), st.integers(2, 8), st.data())
def test_even_routing_costs_one(sequences: int, experts: int, data: st.DataObject) -> None:
    chosen = data.draw(st.integers(1, experts))
    tokens = experts * 3
    indices = (torch.arange(tokens)[:, None] + torch.arange(chosen)) % experts
    loss = balance_loss(torch.rand(sequences * tokens, experts), indices.repeat(sequences, 1), sequences)
    torch.testing.assert_close(loss, torch.ones(()))


def test_a_loss_added_to_a_tensor_is_minimised_and_changes_no_value() -> None:
    x, weight = torch.ones(3, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    out = with_loss(x, weight.square())
    assert torch.equal(out, x)
    (5 * out).sum().backward()
    assert weight.grad == 4 and torch.equal(x.grad, torch.full((3,), 5.0))

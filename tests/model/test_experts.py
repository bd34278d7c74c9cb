import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import smolseek.model.experts
from smolseek.model.experts import MixtureOfExperts, TopkRouter, count_experts, grouped_linear, place_rows, row_unit
from tests.factories import enliven, tiny_v3_config


def lively_moe(**overrides: object) -> MixtureOfExperts:
    moe = MixtureOfExperts(tiny_v3_config(**overrides))
    enliven(moe)
    return moe


def router_of(weight_ED: torch.Tensor, **overrides: object) -> TopkRouter:
    config = tiny_v3_config(n_routed_experts=weight_ED.shape[0], hidden_size=weight_ED.shape[1], **overrides)
    router = TopkRouter(config)
    with torch.no_grad():
        router.weight.copy_(weight_ED)
    return router


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(any),
    st.integers(1, 20),
    st.integers(1, 20),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_grouped_linear_is_a_linear_per_expert(
    counts: list[int], in_width: int, out_width: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x = torch.randn(sum(counts), in_width, dtype=dtype, requires_grad=True)
    weight = torch.randn(len(counts), out_width, in_width, dtype=dtype, requires_grad=True)
    out = grouped_linear(x, weight, torch.tensor(counts).cumsum(0).int())
    expected = torch.cat([part @ w.T for part, w in zip(x.split(counts), weight.unbind(), strict=True)])
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    direction = torch.randn_like(out)
    grads = torch.autograd.grad((out * direction).sum(), (x, weight))
    expected_grads = torch.autograd.grad((expected * direction).sum(), (x, weight))
    for grad, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=tolerance, atol=tolerance)


def test_an_expert_without_tokens_has_zero_gradient_and_no_nan() -> None:
    moe = lively_moe(n_shared_experts=1)
    moe.gate.e_score_correction_bias[2:5] = -10
    x = torch.randn(2, 9, 40)
    moe(x).pow(2).sum().backward()
    assert moe.gate.expert_counts[2:5].tolist() == [0, 0, 0]
    for parameter in (moe.experts.gate_up_proj, moe.experts.down_proj, moe.gate.weight):
        assert parameter.grad is not None and parameter.grad.isfinite().all()
        assert (parameter.grad[2:5] == 0).all()
        assert (parameter.grad[[0, 1, 5, 6, 7]].flatten(1).norm(dim=1) > 0).all()


def test_no_token_is_dropped_however_skewed() -> None:
    moe = lively_moe(num_experts_per_tok=1, norm_topk_prob=True, routed_scaling_factor=1.0, n_shared_experts=0)
    moe.gate.e_score_correction_bias[3] = 10
    x = torch.randn(1, 50, 40)
    with torch.no_grad():
        out = moe(x)
        gate, up = (x @ moe.experts.gate_up_proj[3].T).chunk(2, dim=-1)
        expected = (torch.nn.functional.silu(gate) * up) @ moe.experts.down_proj[3].T
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert moe.gate.expert_counts.tolist() == [0, 0, 0, 50, 0, 0, 0, 0]


def test_counts_add_up_and_stay_out_of_checkpoints() -> None:
    moe = lively_moe()
    for _ in range(2):
        moe(torch.randn(2, 5, 40))
    assert moe.gate.expert_counts.sum() == 2 * 2 * 5 * 3
    assert moe.gate.expert_counts.dtype == torch.int64
    assert not any("counts" in name for name in moe.state_dict())


def test_bias_chooses_and_never_weighs() -> None:
    router = router_of(torch.eye(4), num_experts_per_tok=2)
    x = torch.tensor([[2.0, 1.0, -1.0, -2.0]])
    plain_weights, plain_choice = router(x)
    router.e_score_correction_bias.copy_(torch.tensor([0.3, 0.2, 0.0, 0.0]))  # the same two win
    weights, choice = router(x)
    assert choice.tolist() == plain_choice.tolist()
    assert torch.equal(weights, plain_weights)
    router.e_score_correction_bias.copy_(torch.tensor([0.0, 0.0, 0.0, 5.0]))  # another wins; it has its own weight
    weights, choice = router(x)
    scores = x.sigmoid()[0, choice[0]]
    assert 3 in choice[0].tolist()
    torch.testing.assert_close(weights[0], 1.5 * scores / scores.sum())


def test_groups_are_chosen_by_their_two_best() -> None:
    router = router_of(torch.eye(6), n_group=3, topk_group=1, num_experts_per_tok=2)
    _, choice = router(torch.tensor([[9.0, -9.0, 1.0, 1.0, 0.0, 0.0]]))  # the single best expert has a poor partner
    assert sorted(choice[0].tolist()) == [2, 3]


@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_softmax_scores(norm_topk_prob: bool) -> None:
    router = router_of(
        torch.randn(8, 40), scoring_func="softmax", norm_topk_prob=norm_topk_prob, routed_scaling_factor=2.0
    )
    x = torch.randn(10, 40)
    weights, choice = router(x)
    probabilities = (x @ router.weight.T).softmax(-1)
    best = probabilities.topk(3)
    assert [sorted(row) for row in choice.tolist()] == [sorted(row) for row in best.indices.tolist()]
    if norm_topk_prob:
        torch.testing.assert_close(weights.sum(-1), torch.full((10,), 2.0))
    else:
        torch.testing.assert_close(weights, 2 * probabilities.gather(1, choice))


def test_router_stays_fp32_under_autocast() -> None:
    router = router_of(torch.randn(8, 40))
    x = torch.randn(64, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights, choice = router(x)
    expected_weights, expected_choice = router(x)
    assert torch.equal(weights, expected_weights) and torch.equal(choice, expected_choice)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 3), st.integers(3, 6), st.sampled_from([1, 4, 16]), st.integers(0, 5))
def test_rows_are_sorted_by_expert_and_experts_end_at_multiples(
    tokens: int, choices: int, experts: int, unit: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    indices = torch.rand(tokens, experts, generator=generator).topk(choices).indices
    rows, token, ends = place_rows(indices, count_experts(indices, experts), unit)
    assert (ends % unit == 0).all() and ends[-1] == len(token) and len(token) < tokens * choices + experts * unit
    assert rows.flatten().unique().numel() == tokens * choices
    assert (torch.bucketize(rows, ends, right=True) == indices).all()
    assert (token[rows] == torch.arange(tokens).unsqueeze(1)).all()


def test_padding_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    moe, results = lively_moe(), []
    x = torch.randn(2, 33, 40, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for unit in (1, 16):
        monkeypatch.setattr(smolseek.model.experts, "row_unit", lambda *_, unit=unit: unit)
        out = moe(x)
        learnt = [parameter for parameter in moe.parameters() if parameter.requires_grad]
        results.append([out, *torch.autograd.grad(out.sin().sum(), (x, *learnt))])
    torch.testing.assert_close(*results)


def test_experts_that_must_have_a_row_get_zero_gradients_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a Blackwell GPU, where grouped_mm gives an expert without rows a gradient."""
    moe, results = lively_moe(), []
    moe.gate.e_score_correction_bias[2:5] = -10
    x = torch.randn(2, 9, 40, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for least in (0, 1):
        monkeypatch.setattr(smolseek.model.experts, "least_rows", lambda _, least=least: least)
        out = moe(x)
        learnt = [parameter for parameter in moe.parameters() if parameter.requires_grad]
        results.append([out, *torch.autograd.grad(out.sin().sum(), (x, *learnt))])
    torch.testing.assert_close(*results)
    assert (results[1][2][2:5] == 0).all() and (results[1][3][2:5] == 0).all()  # gate_up_proj and down_proj
    indices = torch.tensor([[0, 3], [3, 0]])
    _, token, ends = place_rows(indices, count_experts(indices, 5), 1, 1)
    assert ends.tolist() == [2, 3, 4, 6, len(token)] and len(token) == 4 + 5


def test_bf16_rows_on_a_cpu_come_in_few_sizes() -> None:
    few, many = torch.zeros(64, 2, dtype=torch.int64), torch.zeros(2048, 2, dtype=torch.int64)
    x, counts = torch.zeros(1, 8, dtype=torch.bfloat16), torch.zeros(8, dtype=torch.int64)
    assert row_unit(x, many, counts) == 32 and row_unit(x, few, counts) == 1
    assert row_unit(x.float(), many, counts) == 1

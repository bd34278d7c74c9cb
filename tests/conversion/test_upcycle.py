"""Upcycling keeps the function whichever copy the router chooses, and starts balanced."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from smolseek.conversion.upcycle import balancing_bias, router_rows, upcycle


def swiglu(weights, x):
    return (F.silu(x @ weights["gate_proj"].T) * (x @ weights["up_proj"].T)) @ weights["down_proj"].T


def made(shared, chosen, copies, width, seed, padding=0):
    g = torch.Generator().manual_seed(seed)
    neurons = (shared + chosen) * width
    shapes = {"gate_proj": (neurons, 10), "up_proj": (neurons, 10), "down_proj": (10, neurons)}
    weights = {name: torch.randn(shape, generator=g).double() for name, shape in shapes.items()}
    config = {
        "intermediate_size": neurons,
        "n_shared_experts": shared,
        "num_experts_per_tok": chosen,
        "n_routed_experts": copies * chosen,
        "moe_intermediate_size": width + padding,
    }
    rows, bias = torch.randn(copies, 10, generator=g), torch.randn(copies, generator=g)
    return weights, rows, bias, dict(upcycle(weights, config, rows, bias)), g


@given(
    st.integers(0, 3), st.integers(2, 4), st.integers(1, 4), st.integers(1, 5), st.integers(0, 3), st.integers(0, 999)
)
@settings(max_examples=20, deadline=None)
def test_the_shared_part_and_any_one_copy_are_the_dense_mlp(shared, chosen, copies, width, padding, seed):
    weights, rows, bias, tensors, g = made(shared, chosen, copies, width, seed, padding)
    x = torch.randn(7, 10, generator=g).double()

    def expert(prefix):
        return swiglu({name: tensors[f"{prefix}.{name}.weight"] for name in weights}, x)

    for copy in range(copies):
        whole = expert("shared_experts") + sum(expert(f"experts.{copy * chosen + part}") for part in range(chosen))
        torch.testing.assert_close(whole, swiglu(weights, x))
    assert tensors["experts.0.down_proj.weight"].shape == (10, width + padding)
    assert torch.equal(tensors["gate.weight"].view(copies, chosen, 10), rows[:, None].expand(-1, chosen, -1))
    assert torch.equal(tensors["gate.e_score_correction_bias"], bias.repeat_interleave(chosen))


def test_tensors_share_no_memory():
    _, _, _, tensors, _ = made(2, 2, 3, 4, 0)
    assert len({t.untyped_storage().data_ptr() for t in tensors.values()}) == len(tensors)


def test_router_starts_balanced_on_other_tokens_too():
    """The inputs are far from the origin, as in a network: random rows would send all tokens to one copy."""
    g = torch.Generator().manual_seed(0)
    mean = 3 * torch.randn(24, generator=g)
    sample, fresh = (mean + torch.randn(4096, 24, generator=g) for _ in range(2))
    rows = router_rows(sample[None], 4, g)
    torch.testing.assert_close((sample @ rows.T).std(0), torch.ones(4), rtol=1e-4, atol=1e-4)
    bias = balancing_bias(sample, rows)
    assert abs(float(bias.mean())) < 1e-6
    for tokens, limit in ((sample, 0.02), (fresh, 0.15)):
        load = torch.bincount(((tokens @ rows.T).sigmoid() + bias).argmax(-1), minlength=4).float()
        assert float(load.max() / load.mean() - 1) < limit


def test_kinds_of_tokens_go_to_copies_of_their_own_whatever_their_text():
    """An input is a mean, plus a large part that its whole text shares, plus the part of one of four kinds of token."""
    g = torch.Generator().manual_seed(0)
    kinds, kind = torch.randn(4, 24, generator=g), torch.arange(4).repeat(64)
    texts = 3 * torch.randn(24, generator=g) + torch.randn(6, 1, 2, generator=g) @ torch.randn(2, 24, generator=g)
    inputs = texts + kinds[kind] + 0.1 * torch.randn(6, 256, 24, generator=g)
    rows = router_rows(inputs, 4, g)
    copy = ((inputs @ rows.T).sigmoid() + balancing_bias(inputs.flatten(0, 1), rows)).argmax(-1)
    most = [int(copy[:, kind == k].mode().values.mode().values) for k in range(4)]
    assert sorted(most) == [0, 1, 2, 3]
    assert all(float((copy[:, kind == k] == most[k]).float().mean()) > 0.95 for k in range(4))

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from smolseek.numerics.muon import Muon, matrix_indices, orthogonal


@given(st.integers(1, 3), st.integers(1, 12), st.integers(1, 12))
def test_an_orthogonal_update_keeps_directions_and_levels_sizes(matrices, rows, columns):
    update = torch.randn(matrices, rows, columns, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(update, full_matrices=False)
    made = orthogonal(update, (3.4445, -4.775, 2.0315), 1e-7)
    sizes = u.mT @ made @ v.mT
    torch.testing.assert_close(sizes, torch.diag_embed(sizes.diagonal(dim1=1, dim2=2)), rtol=0, atol=1e-3)
    assert sizes.diagonal(dim1=1, dim2=2).max() < 1.3
    assert torch.equal(orthogonal(update * 0, (3.4445, -4.775, 2.0315), 1e-7), update * 0)


@given(
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(1, 6),
    st.sampled_from(["experts.gate_up_proj", "down_proj.weight", "q_proj.weight", "kv_b_proj.weight", "o_proj.weight"]),
)
def test_the_matrix_indices_a_parameter_are_its_whole_and_do_not_overlap(experts, rows, columns, name):
    for shape in ((experts, 2 * rows, 2 * columns), (2 * rows, 2 * columns)):
        count = torch.zeros(shape)
        indices = list(matrix_indices(name, count, heads=2))
        for index in indices:
            assert count[index].dim() == 2
            count[index] += 1
        assert (count == 1).all()
        assert len(indices) == (1 if "down" in name else 2) * (experts if len(shape) == 3 else 1)


def test_muon_and_adamw_steps_are_of_one_size():
    """The root mean squares of a first step at the same learning rate are of one order."""
    g = torch.Generator().manual_seed(0)
    weight, grad = torch.randn(24, 40, generator=g), torch.randn(24, 40, generator=g)
    sizes = []
    for optimizer in (lambda p: Muon([{"params": [("w", p)]}], lr=0.1), lambda p: torch.optim.AdamW([p], lr=0.1)):
        p = nn.Parameter(weight.clone())
        p.grad = grad.clone()
        optimizer(p).step()
        sizes.append(float((p.detach() - weight).square().mean().sqrt()))
    assert 0.1 < sizes[0] / sizes[1] < 1  # AdamW's very first step is larger than its later ones

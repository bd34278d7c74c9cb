import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from smolseek.numerics.muon import Muon, orthogonal
from tests.numerics.muon_processes import PROCESSES, check


@given(st.integers(1, 3), st.integers(1, 12), st.integers(1, 12))
def test_an_orthogonal_update_keeps_directions_and_levels_sizes(matrices, rows, columns):
    update = torch.randn(matrices, rows, columns, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(update, full_matrices=False)
    made = orthogonal(update, (3.4445, -4.775, 2.0315), 1e-7)
    sizes = u.mT @ made @ v.mT
    torch.testing.assert_close(sizes, torch.diag_embed(sizes.diagonal(dim1=1, dim2=2)), rtol=0, atol=1e-3)
    assert sizes.diagonal(dim1=1, dim2=2).max() < 1.3
    assert torch.equal(orthogonal(update * 0, (3.4445, -4.775, 2.0315), 1e-7), update * 0)


@pytest.mark.parametrize(("experts", "rows", "columns"), [(1, 1, 1), (3, 2, 5), (4, 5, 2)])
@pytest.mark.parametrize(
    "name", ["experts.gate_up_proj", "down_proj.weight", "q_proj.weight", "kv_b_proj.weight", "o_proj.weight"]
)
def test_every_matrix_of_a_parameter_is_made_orthogonal_by_itself(monkeypatch, experts, rows, columns, name):
    seen = []
    for shape in ((experts, 2 * rows, 2 * columns), (2 * rows, 2 * columns)):
        monkeypatch.setattr("smolseek.numerics.muon.orthogonal", lambda cut_POA: seen.append(cut_POA) or cut_POA)
        update = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        assert torch.equal(Muon([{"params": [(name, update)]}], heads=2)._orthogonal(name, update), update)
        down, across = (1, 1) if "down" in name else (1, 2) if "o_proj" in name else (2, 1)
        height, width = 2 * rows // down, 2 * columns // across
        assert seen[-1].shape == (update.numel() // (height * width), height, width)
        assert torch.equal(seen[-1][0], update.view(-1, 2 * rows, 2 * columns)[0, :height, :width])


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


@pytest.mark.timeout(600)
def test_four_processes_step_as_one_and_iterate_each_matrix_once(tmp_path):
    torch.multiprocessing.spawn(check, (str(tmp_path),), nprocs=PROCESSES)


def test_a_state_of_single_matrices_is_refused():
    """The first version of smolseek kept the momentum of each expert by itself."""
    muon = Muon([{"params": [("experts.down_proj", nn.Parameter(torch.zeros(2, 3, 4)))]}])
    tree = muon.state_dict() | {"state": {n: {"momentum_buffer": torch.zeros(3, 4)} for n in range(2)}}
    with pytest.raises(ValueError, match=r"matrix by matrix.*--force"):
        muon.load_state_dict(tree)

import pytest
import torch

from smolseek.numerics.rounding import rounded

SIXTEEN_BITS = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


@SIXTEEN_BITS
def test_the_mean_of_the_error_is_zero_and_each_number_goes_to_a_neighbour(dtype):
    torch.manual_seed(0)
    exact = torch.randn(50, 4000) + 3
    error = rounded(exact, dtype).float() - exact
    steps = torch.finfo(dtype).eps * 2 ** exact.abs().log2().floor()
    assert (error.abs() < steps).all() and (error.abs() > steps / 2).any()
    assert error.mean().abs() < 5 * error.std() / exact.numel() ** 0.5


@SIXTEEN_BITS
def test_a_small_step_from_the_grid_survives_in_the_mean(dtype):
    grid = torch.full((100_000,), 0.1).to(dtype).float()
    moved = grid + 0.2 * torch.finfo(dtype).eps * 0.0625  # a fifth of a step of the grid
    assert torch.equal(moved.to(dtype).float(), grid)
    share = ((rounded(moved, dtype).float() - grid) / (moved - grid)).mean()
    assert float(share) == pytest.approx(1, abs=0.05)


@SIXTEEN_BITS
def test_numbers_of_the_dtype_stay_and_equal_tensors_are_rounded_equally(dtype):
    torch.manual_seed(0)
    exact = torch.cat([torch.randn(1000), torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 2.0**15])])
    held = exact.to(dtype)
    assert torch.equal(rounded(held.float(), dtype), held) and torch.equal(rounded(held, dtype), held)
    assert torch.equal(rounded(exact, dtype), rounded(exact.clone(), dtype))
    assert rounded(torch.tensor([torch.nan]), dtype).isnan().all()
    assert rounded(torch.ones(2, 0), dtype).shape == (2, 0) and rounded(torch.tensor(1.0), dtype).shape == ()


def test_other_dtypes_are_cast():
    exact = torch.randn(7, dtype=torch.float64)
    assert torch.equal(rounded(exact, torch.float32), exact.float())

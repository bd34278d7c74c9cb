"""Hand-written backward passes against autograd's for the plain expression."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from smolseek.model.experts import grouped_linear
from smolseek.model.fused import Combine, Dispatch, RMSNormOfRows, SwiGLUExperts


def with_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """Returns the output, and the gradient of a fixed weighted sum of it at each input."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    out = function(*leaves)
    direction = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).sin().view_as(out).to(out.dtype)
    return [out.detach(), *torch.autograd.grad((out * direction).sum(), leaves)]


def assert_as_near_to_fp64(fused: Callable[..., Tensor], plain: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Compares errors against fp64: in the inputs' dtype `fused` may have 1.3 times the error of `plain`, plus 1e-6
    of the norm."""
    exact = with_gradients(plain, *(tensor.double() for tensor in inputs))
    for got, usual, true in zip(with_gradients(fused, *inputs), with_gradients(plain, *inputs), exact, strict=True):
        error, usual_error = ((value.double() - true).norm() / true.norm() for value in (got, usual))
        assert got.dtype == usual.dtype and error < 1.3 * usual_error + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 64.0])
def test_rms_norm(dtype: torch.dtype, scale: float) -> None:
    torch.manual_seed(0)
    x, gain = (scale * torch.randn(2, 7, 24)).to(dtype), (1 + 0.2 * torch.randn(24)).to(dtype)
    assert_as_near_to_fp64(
        lambda x, gain: RMSNormOfRows.apply(x, gain, 1e-5), lambda x, gain: F.rms_norm(x, (24,), gain, 1e-5), x, gain
    )


def test_dispatch_and_combine_are_selections_and_sums() -> None:
    torch.manual_seed(0)
    rows = torch.randperm(11)[:10].view(5, 2)  # one of the 11 rows is padding
    token = torch.zeros(11, dtype=torch.int64).index_copy(0, rows.flatten(), torch.arange(10) // 2)
    x, y = torch.randn(5, 4), torch.randn(11, 4)
    got = with_gradients(lambda x: Dispatch.apply(x, token, rows)[rows.flatten()], x)
    torch.testing.assert_close(got, with_gradients(lambda x: x[token][rows.flatten()], x))
    got = with_gradients(lambda y: Combine.apply(y, token, rows), y)
    is_used = torch.zeros(11, 1).index_fill(0, rows.flatten(), 1)
    got[1] = got[1] * is_used  # the padding row gets a gradient too, which its weight 0 removes
    torch.testing.assert_close(got, with_gradients(lambda y: y[rows].sum(1), y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    ends = torch.tensor([16, 16, 40]).int()
    x, weights = torch.randn(40, 24).to(dtype), torch.rand(40, 1).to(dtype)
    gate_up, down = torch.randn(3, 32, 24).to(dtype) / 5, torch.randn(3, 24, 16).to(dtype) / 4

    def plain(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        product = _linear_by_expert if x.dtype == torch.float64 else grouped_linear
        gate, up = product(x, gate_up, ends).chunk(2, dim=-1)
        return product(F.silu(gate) * up, down, ends) * weights

    assert_as_near_to_fp64(lambda *inputs: SwiGLUExperts.apply(*inputs, ends), plain, x, weights, gate_up, down)


def _linear_by_expert(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    parts = x.tensor_split(ends[:-1].long())
    return torch.cat([part @ matrix.T for part, matrix in zip(parts, weight, strict=True)])


def test_frozen_weights_get_no_gradient() -> None:
    ends = torch.tensor([8, 16]).int()
    x, gate_up, down = torch.randn(16, 8, requires_grad=True), torch.randn(2, 16, 8), torch.randn(2, 8, 8)
    SwiGLUExperts.apply(x, torch.ones(16, 1), gate_up, down, ends).sum().backward()
    assert x.grad is not None and gate_up.grad is None and down.grad is None

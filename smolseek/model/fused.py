"""Parts of a layer with backward passes written by hand: fewer passes over memory than autograd makes of them.

Shapes: N tokens, D hidden, E experts, K experts per token, M = N * K rows sorted by expert, I moe_intermediate_size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class RMSNormOfRows(torch.autograd.Function):
    """x / sqrt(mean(x²) + eps) · gain over the last dimension (Zhang & Sennrich 2019, equation 4), in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain_D: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = (norm.square() / x.shape[-1] + eps).rsqrt()
        ctx.save_for_backward(x, gain_D, scale)
        return (x.float() * scale).mul_(gain_D).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gain_D, scale = ctx.saved_tensors
        x_ND, scale_N1 = x.float().flatten(0, -2), scale.flatten(0, -2)
        out_grad_ND = out_grad.float().flatten(0, -2)
        product_ND, gain_D1 = out_grad_ND * x_ND, gain_D.float().unsqueeze(1)
        gain_grad_D = (scale_N1.t() @ product_ND).squeeze(0)
        along_N1 = (product_ND @ gain_D1) * scale_N1.pow(3) / -x.shape[-1]
        x_grad_ND = (out_grad_ND * gain_D).mul_(scale_N1).addcmul_(x_ND, along_N1)
        return x_grad_ND.to(x.dtype).view_as(x), gain_grad_D.to(gain_D.dtype), None


class Dispatch(torch.autograd.Function):
    """Tokens (N, D) as rows (M, D): row m is a copy of token `token_M[m]`, and token n's rows are `rows_NK[n]`."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, token_M: Tensor, rows_NK: Tensor) -> Tensor:
        ctx.save_for_backward(rows_NK)
        return x_ND.index_select(0, token_M)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, row_grad_MD: Tensor) -> tuple[Tensor | None, ...]:
        return F.embedding_bag(ctx.saved_tensors[0], row_grad_MD, mode="sum"), None, None


class Combine(torch.autograd.Function):
    """Rows (M, D) back as the sum of each token's (N, D): the adjoint of `Dispatch`."""

    @staticmethod
    def forward(ctx: Any, row_MD: Tensor, token_M: Tensor, rows_NK: Tensor) -> Tensor:
        ctx.save_for_backward(token_M)
        return F.embedding_bag(rows_NK, row_MD, mode="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        return grad_ND.index_select(0, ctx.saved_tensors[0]), None, None


class SwiGLUExperts(torch.autograd.Function):
    """w · W_down (silu(W_gate x) * W_up x) of each row by its expert (M, D); expert e's rows end at `ends_E[e]`.

    The weight w is multiplied into the I hidden values, which are fewer than the D outputs.
    """

    @staticmethod
    def forward(
        ctx: Any, x_MD: Tensor, weights_M1: Tensor, gate_up_EJD: Tensor, down_EDI: Tensor, ends_E: Tensor
    ) -> Tensor:
        gate_up_MJ = F.grouped_mm(x_MD, gate_up_EJD.transpose(1, 2), offs=ends_E)
        gate_MI, up_MI = gate_up_MJ.chunk(2, dim=-1)
        ctx.save_for_backward(x_MD, weights_M1, gate_up_EJD, down_EDI, ends_E, gate_up_MJ)
        return F.grouped_mm(F.silu(gate_MI).mul_(up_MI).mul_(weights_M1), down_EDI.transpose(1, 2), offs=ends_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_grad_MD: Tensor) -> tuple[Tensor | None, ...]:
        x_MD, weights_M1, gate_up_EJD, down_EDI, ends_E, gate_up_MJ = ctx.saved_tensors
        wants_x, wants_weights, wants_gate_up, wants_down, _ = ctx.needs_input_grad
        out_grad_MD = out_grad_MD.contiguous()
        gate_MI, up_MI = gate_up_MJ.chunk(2, dim=-1)
        active_MI = F.silu(gate_MI)
        gated_MI = active_MI * up_MI
        inner_grad_MI = F.grouped_mm(out_grad_MD, down_EDI, offs=ends_E)
        weights_grad_M1 = (inner_grad_MI * gated_MI).sum(-1, keepdim=True) if wants_weights else None
        inner_grad_MI.mul_(weights_M1)
        down_grad_EDI = None
        if wants_down:
            down_grad_EDI = F.grouped_mm(out_grad_MD.t(), gated_MI.mul_(weights_M1), offs=ends_E)
        up_grad_MI = inner_grad_MI * active_MI
        gate_grad_MI = torch.ops.aten.silu_backward(inner_grad_MI.mul_(up_MI), gate_MI)
        gate_up_grad_MJ = torch.cat((gate_grad_MI, up_grad_MI), dim=-1)
        gate_up_grad_EJD = F.grouped_mm(gate_up_grad_MJ.t(), x_MD, offs=ends_E) if wants_gate_up else None
        x_grad_MD = F.grouped_mm(gate_up_grad_MJ, gate_up_EJD, offs=ends_E) if wants_x else None
        return x_grad_MD, weights_grad_M1, gate_up_grad_EJD, down_grad_EDI, None

"""Parts of a layer with hand-written backward passes, which read and write memory less often than autograd's.

Shapes: N tokens, D hidden_size, E n_routed_experts, K num_experts_per_tok, M rows sorted by expert (N × K and padding),
i moe_intermediate_size, J = 2 i, gate and up rows stacked.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class RMSNormOfRows(torch.autograd.Function):
    """RMSNorm in fp32: x / sqrt(mean(x²) + eps) · gain over the last dimension (Zhang & Sennrich 2019, equation 4)."""

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
    """Copies tokens (N, D) into rows (M, D): row m holds token `token_M[m]`, so token n has the rows `rows_NK[n]`."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, token_M: Tensor, rows_NK: Tensor) -> Tensor:
        ctx.save_for_backward(rows_NK)
        return x_ND.index_select(0, token_M)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, row_grad_MD: Tensor) -> tuple[Tensor | None, ...]:
        return F.embedding_bag(ctx.saved_tensors[0], row_grad_MD, mode="sum"), None, None


class Combine(torch.autograd.Function):
    """Adds up the rows (M, D) of each token, giving (N, D): the adjoint of `Dispatch`."""

    @staticmethod
    def forward(ctx: Any, row_MD: Tensor, token_M: Tensor, rows_NK: Tensor) -> Tensor:
        ctx.save_for_backward(token_M)
        return F.embedding_bag(rows_NK, row_MD, mode="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        return grad_ND.index_select(0, ctx.saved_tensors[0]), None, None


class SwiGLUExperts(torch.autograd.Function):
    """Computes w · W_down (silu(W_gate x) * W_up x) for each row, with the weights of the row's expert: (M, D).

    Rows are sorted by expert, and `ends_E[e]` is the end of expert e's rows. The weight w is multiplied into the i
    hidden values, which are fewer than the D outputs.
    """

    @staticmethod
    def forward(
        ctx: Any, x_MD: Tensor, weights_M1: Tensor, gate_up_EJD: Tensor, down_EDi: Tensor, ends_E: Tensor
    ) -> Tensor:
        gate_up_MJ = F.grouped_mm(x_MD, gate_up_EJD.transpose(1, 2), offs=ends_E)
        gate_Mi, up_Mi = gate_up_MJ.chunk(2, dim=-1)
        ctx.save_for_backward(x_MD, weights_M1, gate_up_EJD, down_EDi, ends_E, gate_up_MJ)
        return F.grouped_mm(F.silu(gate_Mi).mul_(up_Mi).mul_(weights_M1), down_EDi.transpose(1, 2), offs=ends_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_grad_MD: Tensor) -> tuple[Tensor | None, ...]:
        x_MD, weights_M1, gate_up_EJD, down_EDi, ends_E, gate_up_MJ = ctx.saved_tensors
        wants_x, wants_weights, wants_gate_up, wants_down, _ = ctx.needs_input_grad
        out_grad_MD = out_grad_MD.contiguous()
        gate_Mi, up_Mi = gate_up_MJ.chunk(2, dim=-1)
        active_Mi = F.silu(gate_Mi)
        gated_Mi = active_Mi * up_Mi
        inner_grad_Mi = F.grouped_mm(out_grad_MD, down_EDi, offs=ends_E)
        weights_grad_M1 = (inner_grad_Mi * gated_Mi).sum(-1, keepdim=True) if wants_weights else None
        inner_grad_Mi.mul_(weights_M1)
        down_grad_EDi = None
        if wants_down:
            down_grad_EDi = F.grouped_mm(out_grad_MD.t(), gated_Mi.mul_(weights_M1), offs=ends_E)
        up_grad_Mi = inner_grad_Mi * active_Mi
        gate_grad_Mi = torch.ops.aten.silu_backward(inner_grad_Mi.mul_(up_Mi), gate_Mi)
        gate_up_grad_MJ = torch.cat((gate_grad_Mi, up_grad_Mi), dim=-1)
        gate_up_grad_EJD = F.grouped_mm(gate_up_grad_MJ.t(), x_MD, offs=ends_E) if wants_gate_up else None
        x_grad_MD = F.grouped_mm(gate_up_grad_MJ, gate_up_EJD, offs=ends_E) if wants_x else None
        return x_grad_MD, weights_grad_M1, gate_up_grad_EJD, down_grad_EDi, None

"""Weights laid out for generating: fewer and faster matrix products, the same function; not to be trained or saved.

A token at a time, a matrix product is as fast as its weights are read. On a CPU bf16 weights are reordered for oneDNN,
which reads them 1.3 to 1.6 times as fast; int8 halves what there is to read. Projections of one input become one.

Shapes: I inputs, O outputs, M rows sorted by expert, E experts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smolseek.model.attention import MultiheadLatentAttention
from smolseek.model.experts import Experts
from smolseek.model.layers import MLP

_INT8_ROWS = 4
"""Up to so many rows the int8 kernel is ahead of the plain product with weights made bf16 first (3,072 x 576)."""


class PackedLinear(nn.Module):
    """A bf16 linear layer whose weight is in oneDNN's own order (CPU)."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ops.mkldnn._reorder_linear_weight(weight_OI, None))
        self.register_buffer("bias", bias_O)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class Int8Linear(nn.Module):
    """A linear layer of int8 weights and a scale for each row of them (symmetric, rounded to nearest)."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        super().__init__()
        scale_O1 = weight_OI.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
        self.register_buffer("weight", (weight_OI.float() / scale_O1).round().to(torch.int8))
        self.register_buffer("scale", scale_O1[:, 0].to(weight_OI.dtype))
        self.register_buffer("bias", bias_O)
        # The kernel reads 16 columns at a time and past the end of what does not divide.
        self.has_kernel = weight_OI.device.type == "cpu" and weight_OI.shape[1] % 16 == 0

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // x.shape[-1]
        if self.has_kernel and rows <= _INT8_ROWS and x.dtype == torch.bfloat16:
            y = torch._weight_int8pack_mm(x.view(rows, -1), self.weight, self.scale).view(*x.shape[:-1], -1)
        else:
            y = F.linear(x, self.weight.to(x.dtype)) * self.scale
        return y if self.bias is None else y + self.bias


class PlainLinear(nn.Module):
    """A linear layer of weights as they are."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight_OI)
        self.register_buffer("bias", bias_O)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


Laid = type[PackedLinear] | type[Int8Linear] | type[PlainLinear]


class FusedMLP(nn.Module):
    """SwiGLU whose gate and up projection are one product."""

    def __init__(self, gate_up_OI: Tensor, down_OI: Tensor, act_fn: nn.Module, laid: Laid) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = laid(gate_up_OI, None), laid(down_OI, None)
        self.act_fn = act_fn

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(self.act_fn(gate) * up)


class LoopedExperts(nn.Module):
    """Routed experts one after the other, those that got no row left out: what few tokens need."""

    def __init__(self, experts: Experts, laid: Laid) -> None:
        super().__init__()
        pairs = zip(experts.gate_up_proj, experts.down_proj, strict=True)
        self.experts = nn.ModuleList(FusedMLP(gate_up, down, experts.act_fn, laid) for gate_up, down in pairs)

    def forward(self, x_MD: Tensor, ends_E: Tensor, weights_M1: Tensor) -> Tensor:
        """As `Experts.forward`."""
        out, start = [], 0
        for expert, end in zip(self.experts, ends_E.tolist(), strict=True):
            if end > start:
                out.append(expert(x_MD[start:end]))
            start = end
        return torch.cat(out) * weights_M1

    def one(self, index: int, x_MD: Tensor) -> Tensor:
        """Outputs (M, D) of one expert."""
        return self.experts[index](x_MD)


@torch.no_grad()
def prepare_for_generation(model: nn.Module, *, int8: bool = False) -> None:
    """Lay `model`'s weights out anew, in place: its linear layers, and our own MLPs, experts and attentions as a whole.

    In fp32 and on a GPU the products are fused and the weights stay as they are. The head is laid out apart from the
    embedding that it may be tied to. `int8` changes the function: 8 bits a weight, in bf16 activations where the model
    is bf16.
    """
    weight = next(model.parameters())
    packs = weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and torch.backends.mkldnn.is_available()
    laid: Laid = Int8Linear if int8 else PackedLinear if packs else PlainLinear
    for module in model.modules():
        if isinstance(module, MultiheadLatentAttention):
            up_k_HNC, up_v_HCV = module.up_projections()
            kept = torch.float32 if weight.device.type == "cpu" else weight.dtype  # a CPU multiplies small fp32 faster
            module.absorbed = up_k_HNC.to(kept).contiguous(), up_v_HCV.to(kept).contiguous()
            _fuse_down_projections(module, laid)
    _replace(model, laid)


def _replace(module: nn.Module, laid: Laid) -> None:
    for name, child in module.named_children():
        if isinstance(child, MLP) and not child.gate_proj.weight.numel():
            continue  # no shared experts
        if isinstance(child, MLP):
            gate_up = torch.cat((child.gate_proj.weight, child.up_proj.weight))
            setattr(module, name, FusedMLP(gate_up, child.down_proj.weight, child.act_fn, laid))
        elif isinstance(child, Experts):
            if child.gate_up_proj.device.type == "cpu":  # a GPU would wait for the loop's bounds
                setattr(module, name, LoopedExperts(child, laid))
        elif isinstance(child, nn.Linear):
            setattr(module, name, laid(child.weight.detach(), child.bias))
        else:
            _replace(child, laid)


def _fuse_down_projections(attention: MultiheadLatentAttention, laid: Laid) -> None:
    """Both projections of the hidden state as one."""
    query = "q_proj" if attention.q_lora_rank is None else "q_a_proj"
    parts = [getattr(attention, name) for name in (query, "kv_a_proj_with_mqa")]
    biases = [torch.zeros_like(p.weight[:, 0]) if p.bias is None else p.bias for p in parts]
    bias_O = None if all(part.bias is None for part in parts) else torch.cat(biases)
    attention.fused_a_proj = laid(torch.cat([part.weight for part in parts]), bias_O)
    for name in (query, "kv_a_proj_with_mqa"):
        delattr(attention, name)

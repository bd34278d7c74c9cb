"""A faster layout of a model's weights for generation. A prepared model can be neither trained nor saved.

When one token is decoded at a time, reading the weights takes most of the time of a matrix product. So on a CPU bf16
weights are reordered for oneDNN, which reads them 1.3 to 1.6 times as fast; and projections that share an input become
one product.

Shapes: A inputs and O outputs of a linear map, M rows sorted by expert, D hidden_size, E n_routed_experts,
H num_attention_heads, U qk_nope_head_dim, C kv_lora_rank, v v_head_dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smolseek.model.attention import MultiheadLatentAttention
from smolseek.model.experts import Experts
from smolseek.model.layers import MLP


class PackedLinear(nn.Module):
    """A bf16 linear layer with its weight in oneDNN's own memory order (CPU only)."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight_OA: Tensor, bias_O: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ops.mkldnn._reorder_linear_weight(weight_OA, None))
        self.register_buffer("bias", bias_O)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class PlainLinear(nn.Module):
    """A linear layer with unchanged weights."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight_OA: Tensor, bias_O: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight_OA)
        self.register_buffer("bias", bias_O)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


LinearLayout = type[PackedLinear] | type[PlainLinear]
"""The class that every linear layer of a prepared model becomes."""


class FusedMLP(nn.Module):
    """SwiGLU MLP with gate and up projection in one product."""

    def __init__(self, gate_up_OA: Tensor, down_OA: Tensor, act_fn: nn.Module, layout: LinearLayout) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = layout(gate_up_OA, None), layout(down_OA, None)
        self.act_fn = act_fn

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(self.act_fn(gate) * up)


class LoopedExperts(nn.Module):
    """Routed experts that run one after the other, and only those that have rows: faster for few tokens."""

    def __init__(self, experts: Experts, layout: LinearLayout) -> None:
        super().__init__()
        pairs = zip(experts.gate_up_proj, experts.down_proj, strict=True)
        self.experts = nn.ModuleList(FusedMLP(gate_up, down, experts.act_fn, layout) for gate_up, down in pairs)

    def forward(self, x_MD: Tensor, ends_E: Tensor, weights_M1: Tensor) -> Tensor:
        """Returns weighted outputs (M, D); arguments as in `Experts.forward`."""
        out, start = [], 0
        for expert, end in zip(self.experts, ends_E.tolist(), strict=True):
            if end > start:
                out.append(expert(x_MD[start:end]))
            start = end
        return torch.cat(out) * weights_M1

    def one(self, index: int, x_MD: Tensor) -> Tensor:
        """Returns the outputs (M, D) of expert `index`."""
        return self.experts[index](x_MD)


def packs_bfloat16() -> bool:
    """Returns whether oneDNN multiplies bf16 on this CPU; on one with AVX2 alone it refuses to pack bf16 weights."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@torch.no_grad()
def prepare_for_generation(model: nn.Module) -> None:
    """Replaces the linear layers of `model` in place, and our own MLPs, experts and attentions as a whole.

    In fp32 and on a GPU products are fused and the weights keep their values and order. A head that is tied to the
    embedding gets a weight of its own.
    """
    weight = next(model.parameters())
    packs = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
    layout: LinearLayout = PackedLinear if packs and packs_bfloat16() else PlainLinear
    for module in model.modules():
        if isinstance(module, MultiheadLatentAttention):
            up_k_HUC, up_v_HCv = module.up_projections()
            # A CPU multiplies small fp32 matrices faster than bf16 ones.
            dtype = torch.float32 if weight.device.type == "cpu" else weight.dtype
            module.absorbed = up_k_HUC.to(dtype).contiguous(), up_v_HCv.to(dtype).contiguous()
            _fuse_down_projections(module, layout)
    _replace_children(model, layout)


def _replace_children(module: nn.Module, layout: LinearLayout) -> None:
    """Replaces the linear layers, MLPs and experts below `module`."""
    for name, child in module.named_children():
        if isinstance(child, MLP) and not child.gate_proj.weight.numel():
            continue  # no shared experts
        if isinstance(child, MLP):
            gate_up = torch.cat((child.gate_proj.weight, child.up_proj.weight))
            setattr(module, name, FusedMLP(gate_up, child.down_proj.weight, child.act_fn, layout))
        elif isinstance(child, Experts):
            if child.gate_up_proj.device.type == "cpu":  # the loop's bounds are read on the CPU; a GPU would wait
                setattr(module, name, LoopedExperts(child, layout))
        elif isinstance(child, nn.Linear):
            setattr(module, name, layout(child.weight.detach(), child.bias))
        else:
            _replace_children(child, layout)


def _fuse_down_projections(attention: MultiheadLatentAttention, layout: LinearLayout) -> None:
    """Replaces the two projections of the hidden state, to queries and to the latent, by one."""
    query = "q_proj" if attention.q_lora_rank is None else "q_a_proj"
    parts = [getattr(attention, name) for name in (query, "kv_a_proj_with_mqa")]
    biases = [torch.zeros_like(p.weight[:, 0]) if p.bias is None else p.bias for p in parts]
    bias_O = None if all(part.bias is None for part in parts) else torch.cat(biases)
    attention.fused_a_proj = layout(torch.cat([part.weight for part in parts]), bias_O)
    for name in (query, "kv_a_proj_with_mqa"):
        delattr(attention, name)

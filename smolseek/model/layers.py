"""RMSNorm and the SwiGLU MLP."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DeepseekV3Config
from transformers.activations import ACT2FN

from smolseek.model.fused import RMSNormOfRows


class RMSNorm(nn.RMSNorm):
    """RMSNorm that casts its gain to the input's dtype, so that autocast needs no kernel for mixed dtypes."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and torch.is_grad_enabled():  # torch would run six operations here
            return RMSNormOfRows.apply(x, self.weight, self.eps)
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class MLP(nn.Module):
    """SwiGLU MLP: down(act(gate(x)) * up(x)). As in transformers, width 0 gives zeros (`n_shared_experts: 0`)."""

    def __init__(self, config: DeepseekV3Config, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

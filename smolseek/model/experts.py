"""Mixture of experts (DeepSeek-V3, section 2.1.2): a router, routed experts by grouped matmul, shared experts.

Shapes: B batch, T tokens, D hidden, N = B * T tokens, E routed experts, K experts per token, G groups,
M = N * K rows sorted by expert, I moe_intermediate_size, O and F the output and input width of a linear map.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DeepseekV3Config
from transformers.activations import ACT2FN, SiLUActivation

from smolseek.model.fused import Combine, Dispatch, SwiGLUExperts
from smolseek.model.layers import MLP
from smolseek.model.routing import balance_loss, quantile_shift, with_loss
from smolseek.numerics.precision import autocast_dtype


class TopkRouter(nn.Module):
    """Chooses K experts per token and weighs them, in fp32 (DeepSeek-V3, equations 13-16).

    Scores are sigmoids, or a softmax when the config carries `scoring_func: softmax` (not stock V3).
    `e_score_correction_bias` takes part in choosing only; `expert_counts` counts the tokens sent to each expert since
    `balance.take_expert_counts` last read it. What else balancing wants of a training forward is off until
    `balance.set_balance` asks for it: quantile shifts of the biases, and a loss over each sequence or the whole batch.
    """

    e_score_correction_bias: Tensor
    expert_counts: Tensor
    quantile_sums: Tensor

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.num_experts = config.n_routed_experts
        self.num_experts_per_tok = config.num_experts_per_tok
        self.n_group, self.topk_group = config.n_group, config.topk_group
        self.norm_topk_prob = config.norm_topk_prob
        self.routed_scaling_factor = config.routed_scaling_factor
        self.scoring_func = getattr(config, "scoring_func", "sigmoid")
        self.weight = nn.Parameter(torch.zeros(self.num_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(self.num_experts))
        self.register_buffer("expert_counts", torch.zeros(self.num_experts, dtype=torch.int64), persistent=False)
        # The sum of the forwards' shifts, and behind them how many: sums are what ranks and micro-batches can add up.
        self.register_buffer("quantile_sums", torch.zeros(self.num_experts + 1), persistent=False)
        self.gathers_quantiles = False
        self.loss_weight, self.loss_over_batch = 0.0, False

    def forward(self, x_ND: Tensor, sequences: int = 1) -> tuple[Tensor, Tensor]:
        """The chosen experts' weights (N, K), fp32, and indices (N, K) of N tokens in `sequences` of equal length."""
        with torch.autocast(x_ND.device.type, enabled=False):
            logits_NE = F.linear(x_ND.float(), self.weight.float())
        scores_NE = logits_NE.softmax(dim=-1) if self.scoring_func == "softmax" else logits_NE.sigmoid()
        biased_NE = scores_NE.detach() + self.e_score_correction_bias
        indices_NK = self.choose(biased_NE)
        weights_NK = scores_NE.gather(1, indices_NK)
        if self.norm_topk_prob:
            weights_NK = weights_NK / (weights_NK.sum(dim=-1, keepdim=True) + 1e-20)
        if self.training and self.gathers_quantiles:
            self.quantile_sums[:-1] += self._quantile_shift(biased_NE)
            self.quantile_sums[-1] += 1
        if self.training and self.loss_weight:
            unbiased_NK = self.choose(scores_NE.detach())
            loss = balance_loss(scores_NE, unbiased_NK, 1 if self.loss_over_batch else sequences)
            weights_NK = with_loss(weights_NK, self.loss_weight * loss)
        return weights_NK * self.routed_scaling_factor, indices_NK

    @property
    def chooses_whole_groups(self) -> bool:
        """Whether a token takes every expert of its groups, so that groups are what is balanced (upcycled models)."""
        grouped = self.topk_group < self.n_group
        return grouped and self.num_experts_per_tok == self.topk_group * (self.num_experts // self.n_group)

    def _quantile_shift(self, biased_NE: Tensor) -> Tensor:
        if not self.chooses_whole_groups:
            return quantile_shift(biased_NE, self.num_experts_per_tok)
        score_NG = biased_NE.unflatten(1, (self.n_group, -1)).topk(2, dim=-1).values.sum(dim=-1)
        # A group's score holds two of its biases.
        return quantile_shift(score_NG, self.topk_group).repeat_interleave(self.num_experts // self.n_group) / 2

    def choose(self, biased_NE: Tensor) -> Tensor:
        """The top K experts (N, K) among the `topk_group` groups whose two best experts sum highest."""
        if self.topk_group < self.n_group:
            biased_NGE = biased_NE.unflatten(1, (self.n_group, -1))
            best_groups = biased_NGE.topk(2, dim=-1).values.sum(dim=-1).topk(self.topk_group, sorted=False).indices
            barred_NG = torch.ones_like(biased_NGE[..., 0], dtype=torch.bool).scatter_(1, best_groups, False)
            biased_NE = biased_NGE.masked_fill(barred_NG.unsqueeze(-1), -torch.inf).flatten(1)
        return biased_NE.topk(self.num_experts_per_tok, dim=-1, sorted=False).indices


class Experts(nn.Module):
    """All routed SwiGLU experts of a layer, applied to rows already sorted by expert."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        E, D, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.zeros(E, 2 * inner, D))
        self.down_proj = nn.Parameter(torch.zeros(E, D, inner))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x_MD: Tensor, ends_E: Tensor, weights_M1: Tensor) -> Tensor:
        """Weighted outputs (M, D); expert e owns the rows from ends_E[e - 1] to ends_E[e] (int32), perhaps none."""
        return swiglu_experts(x_MD, weights_M1, self.gate_up_proj, self.down_proj, ends_E, self.act_fn)

    def one(self, index: int, x_MD: Tensor) -> Tensor:
        """Outputs (M, D) of one expert."""
        gate_MI, up_MI = F.linear(x_MD, self.gate_up_proj[index]).chunk(2, dim=-1)
        return F.linear(self.act_fn(gate_MI) * up_MI, self.down_proj[index])


def swiglu_experts(
    x_MD: Tensor, weights_M1: Tensor, gate_up_EJD: Tensor, down_EDI: Tensor, ends_E: Tensor, act_fn: nn.Module
) -> Tensor:
    """`Experts.forward` by the parameters given; in training by `fused.SwiGLUExperts` where it fits."""
    dtype = autocast_dtype(x_MD)
    aligned = all(width % (16 // dtype.itemsize) == 0 for width in down_EDI.shape[1:])
    if torch.is_grad_enabled() and aligned and isinstance(act_fn, SiLUActivation):
        operands = [tensor.to(dtype) for tensor in (x_MD, weights_M1, gate_up_EJD, down_EDI)]
        return SwiGLUExperts.apply(*operands, ends_E)
    gate_MI, up_MI = grouped_linear(x_MD, gate_up_EJD, ends_E).chunk(2, dim=-1)
    return grouped_linear(act_fn(gate_MI) * up_MI, down_EDI, ends_E) * weights_M1


def grouped_linear(x_MF: Tensor, weight_EOF: Tensor, ends_E: Tensor) -> Tensor:
    """x W_eᵀ for each expert's rows, (M, O), in autocast's dtype where it is on (it does not know grouped_mm)."""
    dtype = autocast_dtype(x_MF)
    x_MF, weight_EOF = x_MF.to(dtype), weight_EOF.to(dtype)
    out_width, in_width = weight_EOF.shape[1:]
    unit = 16 // dtype.itemsize  # grouped_mm wants strides of 16 bytes, backward too
    if out_width % unit or in_width % unit:
        x_MF = F.pad(x_MF, (0, -in_width % unit))
        weight_EOF = F.pad(weight_EOF, (0, -in_width % unit, 0, -out_width % unit))
    return F.grouped_mm(x_MF, weight_EOF.transpose(1, 2), offs=ends_E)[:, :out_width]


class MixtureOfExperts(nn.Module):
    """Shared experts for every token plus K routed ones each; no token is dropped."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.experts = Experts(config)
        self.gate = TopkRouter(config)
        self.shared_experts = MLP(config, config.moe_intermediate_size * config.n_shared_experts)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.flatten(0, 1)
        weights_NK, indices_NK = self.gate(x_ND, sequences=x_BTD.shape[0])
        if len(x_ND) == 1 and x_ND.device.type == "cpu" and not torch.is_grad_enabled():
            return self._one_token(x_ND, weights_NK[0], indices_NK[0]).view_as(x_BTD) + self.shared_experts(x_BTD)
        counts_E = count_experts(indices_NK, self.gate.num_experts)
        self.gate.expert_counts += counts_E
        x_ND = x_ND.to(autocast_dtype(x_ND))  # once for all experts
        rows_NK, token_M, ends_E = place_rows(indices_NK, counts_E, row_unit(x_ND, indices_NK, counts_E))
        weights_M = weights_NK.new_zeros(len(token_M)).index_copy(0, rows_NK.flatten(), weights_NK.flatten())
        row_MD = self.experts(Dispatch.apply(x_ND, token_M, rows_NK), ends_E, weights_M.unsqueeze(-1))
        routed_ND = Combine.apply(row_MD, token_M, rows_NK).to(x_ND.dtype)
        return (routed_ND + self.shared_experts(x_ND)).view_as(x_BTD)

    def _one_token(self, x_1D: Tensor, weights_K: Tensor, indices_K: Tensor) -> Tensor:
        """The routed part without sorting and grouping, which cost more than one token's products."""
        self.gate.expert_counts.scatter_add_(0, indices_K, torch.ones_like(indices_K))
        out_KD = torch.cat([self.experts.one(index, x_1D) for index in indices_K.tolist()])
        return (weights_K.unsqueeze(0) @ out_KD.float()).to(x_1D.dtype)


def count_experts(indices_NK: Tensor, experts: int) -> Tensor:
    """Tokens sent to each expert, (E,) int64."""
    chosen_M = indices_NK.flatten()
    return chosen_M.new_zeros(experts).scatter_add_(0, chosen_M, torch.ones_like(chosen_M))


def place_rows(indices_NK: Tensor, counts_E: Tensor, unit: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows sorted by expert: each choice's row (N, K), each row's token (M,), each expert's end (E,).

    Every expert's rows are a multiple of `unit`; the last one's fill up to an M that no count changes. Rows over are
    copies of the first token that belong to nobody: they need the weight 0.
    """
    (choices, experts), chosen_M = (indices_NK.shape[1], len(counts_E)), indices_NK.flatten()
    order = chosen_M.argsort(stable=True)
    padded_E = (counts_E + unit - 1) // unit * unit
    ends_E = padded_E.cumsum(0)
    shift_E = ends_E - padded_E - (counts_E.cumsum(0) - counts_E)
    each = torch.arange(len(order), device=order.device)
    rows = torch.empty_like(order).index_copy_(0, order, each) + shift_E[chosen_M]
    total = (len(order) + experts * (unit - 1)) // unit * unit  # what the padded counts are at most
    token_M = order.new_zeros(total).index_copy_(0, rows, each // choices)
    ends_E[-1] = total
    return rows.view_as(indices_NK), token_M, ends_E.int()


def row_unit(x_ND: Tensor, indices_NK: Tensor, counts_E: Tensor) -> int:
    """The multiple that an expert's rows are padded to, about a sixteenth of what it has.

    bf16 products on a CPU are compiled for every new number of rows (oneDNN), which takes twice as long as the products
    themselves: the fewer numbers there are, the sooner all of them are known.
    """
    mean = indices_NK.numel() // len(counts_E)
    if x_ND.dtype != torch.bfloat16 or x_ND.device.type != "cpu" or mean < 64:
        return 1
    return max(16, 1 << (mean // 16).bit_length() - 1)

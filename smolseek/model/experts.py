"""Mixture of experts (DeepSeek-V3, section 2.1.2): a router, routed experts by grouped matmul, shared experts.

Shapes: B sequences, T tokens in each, N tokens in one row (B × T), D hidden_size, E n_routed_experts,
K num_experts_per_tok, g groups of experts (n_group), M rows sorted by expert (N × K and padding),
i moe_intermediate_size, J = 2 i gate and up rows stacked, O outputs and A inputs of any linear map,
Z other numbers, flattened.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DeepseekV3Config
from transformers.activations import ACT2FN, SiLUActivation

from smolseek.model.balance_loss import balance_loss, own_counts, with_loss
from smolseek.model.fused import Combine, Dispatch, SwiGLUExperts
from smolseek.model.layers import MLP
from smolseek.numerics.precision import autocast_dtype


class TopkRouter(nn.Module):
    """Chooses K experts per token and weighs them, in fp32 (DeepSeek-V3, equations 13-16).

    Scores are sigmoids, or a softmax when the config has `scoring_func: softmax` (not stock V3).
    `e_score_correction_bias` takes part in choosing only. `expert_counts` counts the tokens sent to each expert since
    the last `balance.take_expert_counts`. In training, `balance_loss_weight` above 0 adds the balance loss, over each
    sequence or over the whole batch, whose counts `sum_counts` adds up over the processes that share it.
    """

    e_score_correction_bias: Tensor
    expert_counts: Tensor

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
        self.balance_loss_weight, self.balance_loss_over_batch = 0.0, False
        self.sum_counts: Callable[[Tensor], Tensor] = own_counts

    def forward(self, x_ND: Tensor, sequences: int = 1) -> tuple[Tensor, Tensor]:
        """Returns weights (N, K), fp32, and indices (N, K) of the chosen experts.

        The N tokens are those of `sequences` sequences of equal length.
        """
        with torch.autocast(x_ND.device.type, enabled=False):
            logits_NE = F.linear(x_ND.float(), self.weight.float())
        scores_NE = logits_NE.softmax(dim=-1) if self.scoring_func == "softmax" else logits_NE.sigmoid()
        biased_NE = scores_NE.detach() + self.e_score_correction_bias
        indices_NK = self.choose(biased_NE)
        weights_NK = scores_NE.gather(1, indices_NK)
        if self.norm_topk_prob:
            weights_NK = weights_NK / (weights_NK.sum(dim=-1, keepdim=True) + 1e-20)
        if self.training and self.balance_loss_weight:
            unbiased_NK = self.choose(scores_NE.detach())
            over = (1, self.sum_counts) if self.balance_loss_over_batch else (sequences, own_counts)
            loss = balance_loss(scores_NE, unbiased_NK, *over)
            weights_NK = with_loss(weights_NK, self.balance_loss_weight * loss)
        return weights_NK * self.routed_scaling_factor, indices_NK

    @property
    def chooses_whole_groups(self) -> bool:
        """Whether a token takes every expert of its groups, as in an upcycled model."""
        grouped = self.topk_group < self.n_group
        return grouped and self.num_experts_per_tok == self.topk_group * (self.num_experts // self.n_group)

    def choose(self, biased_NE: Tensor) -> Tensor:
        """Returns the K experts (N, K) with the highest biased scores, from the best `topk_group` groups.

        A group ranks by the sum of its two best biased scores.
        """
        if self.topk_group < self.n_group:
            grouped_NgZ = biased_NE.unflatten(1, (self.n_group, -1))
            best_groups_NZ = grouped_NgZ.topk(2, dim=-1).values.sum(dim=-1).topk(self.topk_group, sorted=False).indices
            barred_Ng = torch.ones_like(grouped_NgZ[..., 0], dtype=torch.bool).scatter_(1, best_groups_NZ, False)
            biased_NE = grouped_NgZ.masked_fill(barred_Ng.unsqueeze(-1), -torch.inf).flatten(1)
        return biased_NE.topk(self.num_experts_per_tok, dim=-1, sorted=False).indices


class Experts(nn.Module):
    """All routed SwiGLU experts of a layer, applied to rows already sorted by expert."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        E, D, i = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.zeros(E, 2 * i, D))
        self.down_proj = nn.Parameter(torch.zeros(E, D, i))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x_MD: Tensor, ends_E: Tensor, weights_M1: Tensor) -> Tensor:
        """Returns weighted outputs (M, D).

        The rows of expert e are those from ends_E[e - 1] to ends_E[e] (int32); it may have none.
        """
        return swiglu_experts(x_MD, weights_M1, self.gate_up_proj, self.down_proj, ends_E, self.act_fn)

    def one(self, index: int, x_MD: Tensor) -> Tensor:
        """Returns the outputs (M, D) of one expert, not weighted."""
        gate_Mi, up_Mi = F.linear(x_MD, self.gate_up_proj[index]).chunk(2, dim=-1)
        return F.linear(self.act_fn(gate_Mi) * up_Mi, self.down_proj[index])


def swiglu_experts(
    x_MD: Tensor, weights_M1: Tensor, gate_up_EJD: Tensor, down_EDi: Tensor, ends_E: Tensor, act_fn: nn.Module
) -> Tensor:
    """Returns what `Experts.forward` returns, for the given weights.

    Training uses `fused.SwiGLUExperts`, which is faster, where the sizes and the activation allow it.
    """
    dtype = autocast_dtype(x_MD)
    aligned = all(width % (16 // dtype.itemsize) == 0 for width in down_EDi.shape[1:])
    if torch.is_grad_enabled() and aligned and isinstance(act_fn, SiLUActivation):
        operands = [tensor.to(dtype) for tensor in (x_MD, weights_M1, gate_up_EJD, down_EDi)]
        return SwiGLUExperts.apply(*operands, ends_E)
    gate_Mi, up_Mi = grouped_linear(x_MD, gate_up_EJD, ends_E).chunk(2, dim=-1)
    return grouped_linear(act_fn(gate_Mi) * up_Mi, down_EDi, ends_E) * weights_M1


def grouped_linear(x_MA: Tensor, weight_EOA: Tensor, ends_E: Tensor) -> Tensor:
    """Returns x W_eᵀ for each expert's rows, (M, O), in autocast's dtype where it is on.

    The cast is made here, because autocast does not know grouped_mm.
    """
    dtype = autocast_dtype(x_MA)
    x_MA, weight_EOA = x_MA.to(dtype), weight_EOA.to(dtype)
    out_width, in_width = weight_EOA.shape[1:]
    unit = 16 // dtype.itemsize  # grouped_mm wants strides of 16 bytes, backward too
    if out_width % unit or in_width % unit:
        x_MA = F.pad(x_MA, (0, -in_width % unit))
        weight_EOA = F.pad(weight_EOA, (0, -in_width % unit, 0, -out_width % unit))
    return F.grouped_mm(x_MA, weight_EOA.transpose(1, 2), offs=ends_E)[:, :out_width]


class MixtureOfExperts(nn.Module):
    """The shared experts for every token plus K routed experts for each; no token is dropped."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.experts = Experts(config)
        self.gate = TopkRouter(config)
        self.shared_experts = MLP(config, config.moe_intermediate_size * config.n_shared_experts)
        self.has_every_expert = True
        """Whether this process has all experts of the layer, or can gather them."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.flatten(0, 1)
        weights_NK, indices_NK = self.gate(x_ND, sequences=x_BTD.shape[0])
        one_token = len(x_ND) == 1 and x_ND.device.type == "cpu" and not torch.is_grad_enabled()
        if one_token and self.has_every_expert:
            return self._one_token(x_ND, weights_NK[0], indices_NK[0]).view_as(x_BTD) + self.shared_experts(x_BTD)
        counts_E = count_experts(indices_NK, self.gate.num_experts)
        self.gate.expert_counts += counts_E
        x_ND = x_ND.to(autocast_dtype(x_ND))  # once for all experts
        unit = row_unit(x_ND, indices_NK, counts_E)
        rows_NK, token_M, ends_E = place_rows(indices_NK, counts_E, unit, least_rows(x_ND.device))
        weights_M = weights_NK.new_zeros(len(token_M)).index_copy(0, rows_NK.flatten(), weights_NK.flatten())
        row_MD = self.experts(Dispatch.apply(x_ND, token_M, rows_NK), ends_E, weights_M.unsqueeze(-1))
        routed_ND = Combine.apply(row_MD, token_M, rows_NK).to(x_ND.dtype)
        return (routed_ND + self.shared_experts(x_ND)).view_as(x_BTD)

    def _one_token(self, x_1D: Tensor, weights_K: Tensor, indices_K: Tensor) -> Tensor:
        """Returns the weighted sum of one token's experts (1, D).

        It neither sorts nor groups rows: for one token that costs more than the products.
        """
        self.gate.expert_counts.scatter_add_(0, indices_K, torch.ones_like(indices_K))
        out_KD = torch.cat([self.experts.one(index, x_1D) for index in indices_K.tolist()])
        return (weights_K.unsqueeze(0) @ out_KD.float()).to(x_1D.dtype)


@contextlib.contextmanager
def counts_kept(module: nn.Module) -> Iterator[None]:
    """A block that leaves the expert counts below `module` as they were."""
    counts = [buffer_E for name, buffer_E in module.named_buffers() if name.endswith("expert_counts")]
    kept = [counts_E.clone() for counts_E in counts]
    try:
        yield
    finally:
        for counts_E, kept_E in zip(counts, kept, strict=True):
            counts_E.copy_(kept_E)


def count_experts(indices_NK: Tensor, experts: int) -> Tensor:
    """Returns the number of tokens sent to each expert, (E,) int64."""
    chosen_Z = indices_NK.flatten()
    return chosen_Z.new_zeros(experts).scatter_add_(0, chosen_Z, torch.ones_like(chosen_Z))


def place_rows(indices_NK: Tensor, counts_E: Tensor, unit: int, least: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts the N × K choices by expert.

    Returns each choice's row (N, K), each row's token (M,) and the end of each expert's rows (E,), int32. Every expert
    gets at least `least` rows and a multiple of `unit`; the last expert gets all that are left of M, which depends on
    no count. Padding rows repeat token 0 and must have weight 0.
    """
    (choices, experts), chosen_Z = (indices_NK.shape[1], len(counts_E)), indices_NK.flatten()
    order_Z = chosen_Z.argsort(stable=True)
    padded_E = (counts_E.clamp(min=least) + unit - 1) // unit * unit
    ends_E = padded_E.cumsum(0)
    shift_E = ends_E - padded_E - (counts_E.cumsum(0) - counts_E)
    every_Z = torch.arange(len(order_Z), device=order_Z.device)
    rows_Z = torch.empty_like(order_Z).index_copy_(0, order_Z, every_Z) + shift_E[chosen_Z]
    total = (len(order_Z) + experts * (least + unit - 1)) // unit * unit  # at least what the padded counts sum to
    token_M = order_Z.new_zeros(total).index_copy_(0, rows_Z, every_Z // choices)
    ends_E[-1] = total
    return rows_Z.view_as(indices_NK), token_M, ends_E.int()


def row_unit(x_ND: Tensor, indices_NK: Tensor, counts_E: Tensor) -> int:
    """Returns the multiple to which each expert's rows are padded: about a sixteenth of the mean number of rows.

    On a CPU, oneDNN compiles a bf16 product for every new number of rows, which takes twice as long as the product
    itself. Padding leaves few different numbers, so that all of them are soon compiled. Elsewhere the unit is 1.
    """
    mean = indices_NK.numel() // len(counts_E)
    if x_ND.dtype != torch.bfloat16 or x_ND.device.type != "cpu" or mean < 64:
        return 1
    return max(16, 1 << (mean // 16).bit_length() - 1)


def least_rows(device: torch.device) -> int:
    """Returns the fewest rows that an expert must get.

    On Blackwell GPUs grouped_mm gives the weights of an expert without rows a gradient (PyTorch #172439). A padding row
    makes it zero. Elsewhere an expert may have no row.
    """
    return int(device.type == "cuda" and torch.cuda.get_device_properties(device).major >= 10)

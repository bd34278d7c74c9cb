"""Upcycling: a dense SwiGLU MLP as shared and routed experts, the same function at step 0; pure functions on tensors.

Group-limited routing takes exactly one group of experts, and every group is a copy of the same neurons.

Shapes: I intermediate_size, D hidden_size, i moe_intermediate_size, g copies (groups of experts), K num_experts_per_tok
(the experts of one copy), E = g × K n_routed_experts, B windows, T tokens in each, N tokens in one row, P directions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from smolseek.conversion.clusters import cluster_centres
from smolseek.model.balance import next_bias
from smolseek.model.experts import count_experts

_ROUTER_SPREAD = 1.0
_CLUSTER_ROUNDS = 20
_TEXT_DIRECTIONS = 5
_BALANCE_STEPS = 400


def upcycle(
    weights: dict[str, Tensor], config: dict[str, Any], rows_gD: Tensor, bias_g: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """Returns (name under `mlp.`, tensor) of the experts made from gate_proj (I, D), up_proj (I, D), down_proj (D, I).

    The first neurons are shared. Every copy holds all the others, cut into K experts. Routing takes exactly one copy
    (n_group = g, topk_group = 1, scaling K), so its experts weigh 1 each whichever copy it is (docs/method.md,
    "Upcycling"). The experts of a copy have the same router row and bias. An expert wider than its neurons ends in
    zeros.
    """
    experts, shared, width = (config[f] for f in ("num_experts_per_tok", "n_shared_experts", "moe_intermediate_size"))
    neurons = config["intermediate_size"] // (shared + experts)
    for name, tensor in weights.items():
        axis = 1 if name == "down_proj" else 0
        parts = tensor.split([shared * neurons] + [neurons] * experts, dim=axis)
        yield f"shared_experts.{name}.weight", _widen(parts[0], shared * width, axis)
        for expert in range(config["n_routed_experts"]):
            yield f"experts.{expert}.{name}.weight", _widen(parts[1 + expert % experts], width, axis)
    yield "gate.weight", rows_gD.repeat_interleave(experts, dim=0)
    yield "gate.e_score_correction_bias", bias_g.repeat_interleave(experts)


def router_rows(inputs_BTD: Tensor, copies: int, generator: torch.Generator) -> Tensor:
    """Returns router rows (g, D) towards g clusters of the inputs, scaled to logits of standard deviation 1.

    The clusters are k-means by cosine about each window's own mean input, and the rows are made orthogonal to the main
    directions of those means (the first is nearly the mean of all). Otherwise the subject of a text, and the mean of
    all texts, would send its tokens to one copy. After training, copies at clusters predict better than copies at
    random rows (LOG.md).
    """
    means_BD, inputs_ND = inputs_BTD.mean(1), inputs_BTD.flatten(0, 1)
    centred_ND = F.normalize((inputs_BTD - means_BD.unsqueeze(1)).flatten(0, 1), dim=1)
    tokens = len(centred_ND)
    first_g = torch.randperm(max(tokens, copies), generator=generator)[:copies] % tokens
    rows_gD = centred_ND.index_select(0, first_g.to(centred_ND.device))
    for _ in range(_CLUSTER_ROUNDS):
        rows_gD = cluster_centres(centred_ND, (centred_ND @ rows_gD.T).argmax(1), copies)
    about_PD = torch.linalg.svd(means_BD, full_matrices=False).Vh[:_TEXT_DIRECTIONS]
    rows_gD = rows_gD - (rows_gD @ about_PD.T) @ about_PD
    spread_g1 = (inputs_ND @ rows_gD.T).std(0).clamp(min=1e-6).unsqueeze(1)
    return rows_gD * (_ROUTER_SPREAD / spread_g1)


def balancing_bias(inputs_ND: Tensor, rows_ED: Tensor, chosen: int = 1) -> Tensor:
    """Returns the routing bias (E,), mean 0, that gives every expert about the same number of the sample's tokens.

    Each token goes to its `chosen` best. Upcycling passes one row a copy, and gets the bias of each copy. The bias is
    found by the update of training in closed loop, at a speed that falls from the spread of the scores.
    """
    scores_NE = (inputs_ND @ rows_ED.T).sigmoid()
    experts = len(rows_ED)
    bias_E = scores_NE.new_zeros(experts)
    speed = float(scores_NE.std()) / 4
    for _ in range(_BALANCE_STEPS):
        chosen_NK = (scores_NE + bias_E).topk(chosen, dim=-1, sorted=False).indices
        bias_E = next_bias(bias_E, count_experts(chosen_NK, experts), speed)
        speed *= 0.98
    return bias_E


def _widen(tensor: Tensor, width: int, axis: int) -> Tensor:
    """Returns a copy with zeros behind, `width` long along `axis`."""
    shape = list(tensor.shape)
    shape[axis] = width
    widened = tensor.new_zeros(shape)
    widened.narrow(axis, 0, tensor.shape[axis]).copy_(tensor)
    return widened

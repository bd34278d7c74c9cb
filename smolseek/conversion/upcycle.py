"""Upcycling: a dense SwiGLU MLP as shared and routed experts, the same function at step 0; pure functions on tensors.

Shapes: I neurons of the dense MLP, D hidden, M neurons in one expert, N copies, G shards of a copy (= experts per
token), E = N * G routed experts, W windows of T sample tokens, K directions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_ROUTER_SPREAD = 1.0
_CLUSTER_ROUNDS = 20
_TEXT_DIRECTIONS = 5
_BALANCE_STEPS = 400


def upcycle(
    weights: dict[str, Tensor], config: dict[str, Any], rows_ND: Tensor, bias_N: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """(name under `mlp.`, tensor) of the experts made from gate_proj (I, D), up_proj (I, D) and down_proj (D, I).

    The first neurons are shared; every copy holds all the others, cut into G shards. Group-limited routing takes
    exactly one copy (design §4: n_group = N, topk_group = 1, k = G, scaling G), so its shards weigh 1 each whichever
    copy it is. The shards of a copy share a router row and a bias. An expert wider than its neurons ends in zeros.
    """
    shards, shared, width = (config[f] for f in ("num_experts_per_tok", "n_shared_experts", "moe_intermediate_size"))
    neurons = config["intermediate_size"] // (shared + shards)
    for name, tensor in weights.items():
        axis = 1 if name == "down_proj" else 0
        parts = tensor.split([shared * neurons] + [neurons] * shards, dim=axis)
        yield f"shared_experts.{name}.weight", _fill(parts[0], shared * width, axis)
        for expert in range(config["n_routed_experts"]):
            yield f"experts.{expert}.{name}.weight", _fill(parts[1 + expert % shards], width, axis)
    yield "gate.weight", rows_ND.repeat_interleave(shards, dim=0)
    yield "gate.e_score_correction_bias", bias_N.repeat_interleave(shards)


def router_rows(inputs_WTD: Tensor, copies: int, generator: torch.Generator) -> Tensor:
    """Router rows (N, D) towards N clusters of the inputs of W windows, scaled to logits of standard deviation 1.

    K-means by cosine about each window's own mean input, and rows off the main directions of those means (the first is
    nearly the mean of all): what a text is about, and the mean of all texts, would otherwise send its tokens to one
    copy. After training, copies at clusters predict better than copies at random rows (LOG.md).
    """
    means_WD, inputs_TD = inputs_WTD.mean(1), inputs_WTD.flatten(0, 1)
    centred_TD = F.normalize((inputs_WTD - means_WD.unsqueeze(1)).flatten(0, 1), dim=1)
    tokens = len(centred_TD)
    rows_ND = centred_TD[torch.randperm(max(tokens, copies), generator=generator)[:copies] % tokens]
    for _ in range(_CLUSTER_ROUNDS):
        member_TN = F.one_hot((centred_TD @ rows_ND.T).argmax(1), copies).to(centred_TD)
        rows_ND = F.normalize(member_TN.T @ centred_TD, dim=1)
    about_KD = torch.linalg.svd(means_WD, full_matrices=False).Vh[:_TEXT_DIRECTIONS]
    rows_ND = rows_ND - (rows_ND @ about_KD.T) @ about_KD
    spread_N1 = (inputs_TD @ rows_ND.T).std(0).clamp(min=1e-6).unsqueeze(1)
    return rows_ND * (_ROUTER_SPREAD / spread_N1)


def balancing_bias(inputs_TD: Tensor, rows_ND: Tensor, chosen: int = 1) -> Tensor:
    """Routing bias (N,), mean 0, under which every copy gets about the same number of the sample's tokens when each
    token goes to the `chosen` best.

    The loss-less update b += u · sign(mean load - load) in closed loop, u falling from the spread of the scores.
    """
    scores_TN = (inputs_TD @ rows_ND.T).sigmoid()
    copies = len(rows_ND)
    bias_N = scores_TN.new_zeros(copies)
    speed = float(scores_TN.std()) / 4
    for _ in range(_BALANCE_STEPS):
        picks = (scores_TN + bias_N).topk(chosen, dim=-1, sorted=False).indices.flatten()
        load_N = torch.bincount(picks, minlength=copies).float()
        bias_N = bias_N + speed * (load_N.mean() - load_N).sign()
        bias_N = bias_N - bias_N.mean()
        speed *= 0.98
    return bias_N


def _fill(tensor: Tensor, width: int, axis: int) -> Tensor:
    """A copy with zeros behind, `width` long along `axis`."""
    shape = list(tensor.shape)
    shape[axis] = width
    filled = tensor.new_zeros(shape)
    filled.narrow(axis, 0, tensor.shape[axis]).copy_(tensor)
    return filled

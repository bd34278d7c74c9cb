"""Carving: a dense SwiGLU MLP cut into shared and small routed experts, fewer neurons per token; pure functions.

Shapes: N tokens in one row, D hidden_size, I neurons of the dense MLP (or some of them), i neurons of one expert,
E n_routed_experts, K num_experts_per_tok, P parts (the shared experts, then the routed ones), J = P × i, A inputs and
O outputs of a linear map.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from smolseek.conversion.clusters import cluster_centres
from smolseek.conversion.upcycle import balancing_bias
from smolseek.model.balance import next_bias
from smolseek.model.experts import MixtureOfExperts
from smolseek.numerics.precision import algebra_device, autocast
from smolseek.numerics.schedule import warmed_cosine
from smolseek.numerics.shares import ALONE, Shares

_CLUSTER_ROUNDS = 8
_MOVES = 3
_ROUTER_DAMPING = 1e-3
_ROUTER_SPREAD = 0.1  # small, so that the chosen experts' normalised weights start near equal
_REFIT_DAMPING = 0.1  # less fits the sample, and loses on other text
_BALANCED_TOKENS = 4096
_ROUTER_LEARNING_RATE = 3e-4
_BALANCE_SPEED = 1e-3


class Carving(NamedTuple):
    """A carved MLP: gate, up and down (P, i, D) neuron by neuron, router rows (E, D) and the routing bias (E,).

    A place without a neuron is zero in all three: it gives nothing and gets no gradient.
    """

    gate_PiD: Tensor
    up_PiD: Tensor
    down_PiD: Tensor
    rows_ED: Tensor
    bias_E: Tensor


class MlpSample(NamedTuple):
    """The dense MLP's normed inputs and its outputs (N, D) on calibration text, and how much each token counts (N,)."""

    inputs_ND: Tensor
    outputs_ND: Tensor
    weight_N: Tensor

    def at(self, tokens: Any) -> MlpSample:
        """Returns the sample of some tokens only."""
        return MlpSample(*(tensor[tokens] for tensor in self))


def error_weights(behind_ND: Tensor) -> Tensor:
    """Returns how much an MLP's error at each token counts (N,): 1 / |x|², with x the residual stream behind the MLP.

    The next norm divides by |x|. The few tokens with huge activations, attention sinks, would else outweigh all others.
    """
    energy_N = behind_ND.square().sum(-1)
    return 1 / energy_N.maximum(1e-6 * energy_N.mean() + 1e-30)


def carve(weights: dict[str, Tensor], sample: MlpSample, config: dict[str, Any]) -> Carving:
    """Returns the closed form: split, fitted and balanced router, `down_proj` refitted (docs/method.md, "Carving").

    `weights` are gate_proj (I, D), up_proj (I, D) and down_proj (D, I), `config` is the target's. The tokens should
    outnumber the neurons several times.
    """
    gate_ID, up_ID, down_DI = (weights[f"{name}_proj"].float() for name in ("gate", "up", "down"))
    inputs_ND = sample.inputs_ND
    activations_NI = F.silu(inputs_ND @ gate_ID.T) * (inputs_ND @ up_ID.T)
    shared, routed, chosen, width = (
        config[field]
        for field in ("n_shared_experts", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")
    )
    parts = split(activations_NI, down_DI, shared, routed)
    rows_ED, bias_E = _balanced_router(inputs_ND, activations_NI, down_DI, parts[shared:], chosen)
    energy_NI = sample.weight_N[:, None] * (activations_NI * down_DI.norm(dim=0)).square()
    for _ in range(_MOVES):
        mask_NE = _choose(inputs_ND, rows_ED, bias_E, chosen)[1]
        parts = parts[:shared] + move_neurons(parts[shared:], energy_NI, mask_NE)
        rows_ED, bias_E = _balanced_router(inputs_ND, activations_NI, down_DI, parts[shared:], chosen)
    gate, up, down = (_take(neurons_ID, parts, width) for neurons_ID in (gate_ID, up_ID, down_DI.T))
    return refit_down(Carving(gate, up, down, rows_ED, bias_E), sample, chosen)


def split(activations_NI: Tensor, down_DI: Tensor, n_shared: int, n_routed: int) -> list[list[int]]:
    """Returns the neurons of each part, the shared experts first; where they do not come out even, some have one fewer.

    C = |h| · ‖d‖, each token's C at norm 1. The neurons of highest mean C are shared. The others fall into balanced
    k-means clusters of the columns of C, each column at norm 1.
    """
    contributions_NI = F.normalize(activations_NI.abs() * down_DI.norm(dim=0), dim=1)
    order_I = contributions_NI.mean(0).argsort(descending=True)
    width = -(-len(order_I) // (n_shared + n_routed))
    shared_I, routed_I = order_I.split([n_shared * width, len(order_I) - n_shared * width])
    points_IN = F.normalize(contributions_NI.index_select(1, routed_I).T, dim=1)
    parts: list[list[int]] = shared_I.view(n_shared, width).tolist()
    return parts + _members(routed_I, balanced_clusters(points_IN, n_routed), n_routed)


def move_neurons(routed: list[list[int]], energy_NI: Tensor, mask_NE: Tensor) -> list[list[int]]:
    """Returns the routed experts with every neuron where the router keeps most of its energy, the sizes alike.

    `mask_NE` is 1 where a token meets the expert, `energy_NI` what a neuron contributes there, squared.
    """
    neurons_I = torch.tensor(sorted(neuron for part in routed for neuron in part), device=energy_NI.device)
    kept_IE = energy_NI.index_select(1, neurons_I).T @ mask_NE
    clusters_I = _fill_clusters(kept_IE - kept_IE.mean(1, keepdim=True))
    return _members(neurons_I, clusters_I, len(routed))


def _members(neurons_I: Tensor, clusters_I: Tensor, clusters: int) -> list[list[int]]:
    """Returns the neurons of each cluster."""
    return [neurons_I[clusters_I == cluster].tolist() for cluster in range(clusters)]


def balanced_clusters(points_IN: Tensor, clusters: int) -> Tensor:
    """Returns the cluster (I,) of each point: k-means by cosine, no cluster above its equal share, rounded up.

    The first centres are far apart: each is the point least like those before it. Then the likest pairs of point and
    centre are joined first.
    """
    alike_II = points_IN @ points_IN.T
    centres = [int(alike_II.sum(0).argmin())]
    while len(centres) < clusters:
        nearest_I = alike_II.index_select(0, torch.tensor(centres, device=alike_II.device)).amax(0)
        centres.append(int(nearest_I.argmin()))
    assigned_I = _fill_clusters(alike_II.index_select(1, torch.tensor(centres, device=alike_II.device)))
    for _ in range(_CLUSTER_ROUNDS):
        centre_EN = cluster_centres(points_IN, assigned_I, clusters)
        assigned_I = _fill_clusters(points_IN @ centre_EN.T)
    return assigned_I


def _fill_clusters(alike_IE: Tensor) -> Tensor:
    """Returns for each point the likest centre that still has room, the likest pairs first."""
    points, clusters = alike_IE.shape
    room = [-(-points // clusters)] * clusters
    assigned = [-1] * points
    for pair in alike_IE.flatten().argsort(descending=True, stable=True).tolist():
        point, cluster = divmod(pair, clusters)
        if assigned[point] < 0 and room[cluster]:
            assigned[point] = cluster
            room[cluster] -= 1
    return torch.tensor(assigned, device=alike_IE.device)


def fit_router(inputs_ND: Tensor, norms_NE: Tensor, chosen: int) -> Tensor:
    """Returns router rows (E, D): a ridge regression on the oracle, the K experts of largest ‖E_e(x)‖².

    They are scaled to logits of standard deviation 0.1 about each expert's mean; the balancing bias makes up for the
    means.
    """
    oracle_NE = torch.zeros_like(norms_NE).scatter_(1, norms_NE.topk(chosen, dim=1).indices, 1.0)
    rows_ED = _ridge(inputs_ND, oracle_NE - oracle_NE.mean(0), _ROUTER_DAMPING).T
    logits_NE = inputs_ND @ rows_ED.T
    return rows_ED * (_ROUTER_SPREAD / (logits_NE - logits_NE.mean(0)).std().clamp(min=1e-12))


def _balanced_router(
    inputs_ND: Tensor, activations_NI: Tensor, down_DI: Tensor, routed: list[list[int]], chosen: int
) -> tuple[Tensor, Tensor]:
    """Returns router rows (E, D) for these experts, and a routing bias (E,) that balances them."""
    norms_NE = torch.stack([_output_norms(activations_NI, down_DI, part) for part in routed], dim=1)
    rows_ED = fit_router(inputs_ND, norms_NE, chosen)
    few_ND = inputs_ND[:: max(1, len(inputs_ND) // _BALANCED_TOKENS)]
    return rows_ED, balancing_bias(few_ND, rows_ED, chosen)


def refit_down(carving: Carving, sample: MlpSample, chosen: int) -> Carving:
    """Returns the carving with every `down_proj` fitted at once, by weighted least squares on routed activations."""
    hidden_NJ = _routed_activations(carving, sample.inputs_ND, chosen)[0]
    down_JD = carving.down_PiD.flatten(0, 1)
    missing_ND = sample.outputs_ND - hidden_NJ @ down_JD
    root_N1 = (sample.weight_N / sample.weight_N.mean()).sqrt()[:, None]
    down_JD = down_JD + _ridge(root_N1 * hidden_NJ, root_N1 * missing_ND, _REFIT_DAMPING)
    return carving._replace(down_PiD=down_JD.view_as(carving.down_PiD))


def apply_carving(carving: Carving, x_ND: Tensor, chosen: int) -> tuple[Tensor, Tensor]:
    """Returns what the stock block computes, (N, D), and the number of tokens (E,) that each expert received.

    Every neuron runs for every token and unchosen experts weigh 0. At these sizes that trains faster than sorted rows.
    """
    hidden_NJ, counts_E = _routed_activations(carving, x_ND, chosen)
    return hidden_NJ @ carving.down_PiD.flatten(0, 1), counts_E


def refine_carving(
    carving: Carving,
    sample: MlpSample,
    chosen: int,
    *,
    steps: int,
    generator: torch.Generator,
    batch_tokens: int,
    learning_rate: float = 3e-3,
    shares: Shares = ALONE,
) -> Carving:
    """Returns the carving trained to give the dense MLP's outputs on the dense MLP's inputs.

    It trains by Adam with warm-up and cosine. The router learns more slowly than the experts, for it only has to keep
    pace with them. The bias is updated all along, at a speed that falls to zero. Several processes divide every step's
    tokens.
    """
    carving = Carving(*(tensor.clone() for tensor in carving))
    parameters = [tensor.requires_grad_() for tensor in carving[:4]]
    bias_E = carving.bias_E
    rates = [learning_rate] * 3 + [min(learning_rate, _ROUTER_LEARNING_RATE)]
    groups = [{"params": [p], "lr": rate} for p, rate in zip(parameters, rates, strict=True)]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95), fused=True)
    schedule = warmed_cosine(optimizer, steps)
    for step in range(steps):
        picked = torch.randint(len(sample.inputs_ND), (batch_tokens,), generator=generator)
        batch = sample.at(shares.own(picked).to(sample.inputs_ND.device))
        with autocast(batch.inputs_ND.device, "auto"):
            loss, counts_E = carving_loss(carving, batch, chosen)
        loss.backward()
        shares.mean_gradients_(parameters, energy(batch, batch.outputs_ND))  # the loss is over this energy
        shares.sum_(counts_E)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        bias_E.copy_(next_bias(bias_E, counts_E, _BALANCE_SPEED * (1 - step / steps)))
    return Carving(*(tensor.detach() for tensor in carving))


def carving_loss(carving: Carving, sample: MlpSample, chosen: int) -> tuple[Tensor, Tensor]:
    """Returns E w|MoE(x) - MLP(x)|² / E w|MLP(x)|² over a sample, and the tokens (E,) that each expert received."""
    output_ND, counts_E = apply_carving(carving, sample.inputs_ND, chosen)
    return energy(sample, output_ND - sample.outputs_ND) / energy(sample, sample.outputs_ND), counts_E


def energy(sample: MlpSample, values_ND: Tensor) -> Tensor:
    """Returns Σ w|v|² over the tokens of a sample."""
    return (sample.weight_N * values_ND.square().sum(-1)).sum().clamp(min=1e-30)


@torch.no_grad()
def load_carving(block: MixtureOfExperts, carving: Carving) -> None:
    """Copy a carved MLP into the stock block."""
    shared = len(carving.gate_PiD) - len(carving.rows_ED)
    gate_PiD, up_PiD, down_PiD = carving[:3]
    block.shared_experts.gate_proj.weight.copy_(gate_PiD[:shared].flatten(0, 1))
    block.shared_experts.up_proj.weight.copy_(up_PiD[:shared].flatten(0, 1))
    block.shared_experts.down_proj.weight.copy_(down_PiD[:shared].flatten(0, 1).T)
    block.experts.gate_up_proj.copy_(torch.cat([gate_PiD[shared:], up_PiD[shared:]], dim=1))
    block.experts.down_proj.copy_(down_PiD[shared:].mT)
    block.gate.weight.copy_(carving.rows_ED)
    block.gate.e_score_correction_bias.copy_(carving.bias_E)


def _choose(x_ND: Tensor, rows_ED: Tensor, bias_E: Tensor, chosen: int) -> tuple[Tensor, Tensor]:
    """Returns the router's scores (N, E), and a mask (N, E) that is 1 where a token meets the expert."""
    with torch.autocast(x_ND.device.type, enabled=False):  # as in the model
        scores_NE = (x_ND @ rows_ED.T).sigmoid()
    indices_NK = (scores_NE.detach() + bias_E).topk(chosen, dim=-1, sorted=False).indices
    return scores_NE, torch.zeros_like(scores_NE).scatter_(1, indices_NK, 1.0)


def _routed_activations(carving: Carving, x_ND: Tensor, chosen: int) -> tuple[Tensor, Tensor]:
    """Returns activations (N, P * i) and the tokens (E,) of each expert.

    An activation is weighed as stock V3 weighs its expert: sigmoid scores, normalised over the chosen, scaling K.
    """
    scores_NE, mask_NE = _choose(x_ND, carving.rows_ED, carving.bias_E, chosen)
    weights_NE = scores_NE * mask_NE
    weights_NE = chosen * weights_NE / weights_NE.sum(-1, keepdim=True)
    shared = len(carving.gate_PiD) - len(carving.rows_ED)
    weights_NP1 = F.pad(weights_NE, (shared, 0), value=1.0).unsqueeze(-1)
    hidden_NJ = F.silu(x_ND @ carving.gate_PiD.flatten(0, 1).T) * (x_ND @ carving.up_PiD.flatten(0, 1).T)
    hidden_NPi = hidden_NJ.unflatten(-1, carving.gate_PiD.shape[:2]) * weights_NP1
    return hidden_NPi.flatten(1), mask_NE.sum(0)


def _ridge(x_NA: Tensor, y_NO: Tensor, damping: float) -> Tensor:
    """Returns (XᵀX + λI)⁻¹ XᵀY (A, O) of float64 sums, λ a share of the mean diagonal."""
    there, device = x_NA.device, algebra_device(x_NA.device)
    x_NA, y_NO = x_NA.to(device).double(), y_NO.to(device).double()
    moment_AA = x_NA.T @ x_NA
    extra = damping * moment_AA.diagonal().mean() + 1e-300
    damped_AA = moment_AA + extra * torch.eye(len(moment_AA), device=device)
    return torch.linalg.solve(damped_AA, x_NA.T @ y_NO).float().to(there)


def _output_norms(activations_NI: Tensor, down_DI: Tensor, part: list[int]) -> Tensor:
    """Returns ‖E(x)‖² (N,) of the expert that has these neurons."""
    neurons = torch.tensor(part, device=down_DI.device)
    return (activations_NI.index_select(1, neurons) @ down_DI.T.index_select(0, neurons)).square().sum(-1)


def _take(neurons_ID: Tensor, parts: list[list[int]], width: int) -> Tensor:
    """Returns the parts' neurons (P, i, D), zero where there is none."""
    missing = len(neurons_ID)  # the number of a row of zeros
    places = [part + [missing] * (width - len(part)) for part in parts]
    rows = torch.cat([neurons_ID, torch.zeros_like(neurons_ID[:1])])
    picked = torch.tensor(places, device=rows.device).flatten()
    return rows.index_select(0, picked).view(len(parts), width, -1)

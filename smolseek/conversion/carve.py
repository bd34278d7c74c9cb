"""Carving: a dense SwiGLU MLP cut into shared and small routed experts, fewer neurons per token; pure functions.

Shapes: T sample tokens, D hidden, I neurons of the dense MLP, S shared parts, E routed experts, K of them per token,
M neurons in a part, P = S + E parts (the shared ones first).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from smolseek.conversion.upcycle import balancing_bias
from smolseek.model.experts import MixtureOfExperts
from smolseek.numerics.schedule import warmed_cosine

_CLUSTER_ROUNDS = 8
_ROUTER_DAMPING = 1e-3
_ROUTER_SPREAD = 0.1  # small, so that the chosen experts' normalised weights start near equal
_REFIT_DAMPING = 1e-3
_BALANCED_TOKENS = 4096
_ROUTER_LEARNING_RATE = 3e-4
_BALANCE_SPEED = 1e-3


class Carving(NamedTuple):
    """A carved MLP: gate, up and down (P, M, D) neuron by neuron, router rows (E, D) and the routing bias (E,).

    A place without a neuron is zero in all three, gives nothing and gets no gradient.
    """

    gate_PMD: Tensor
    up_PMD: Tensor
    down_PMD: Tensor
    rows_ED: Tensor
    bias_E: Tensor


def carve(weights: dict[str, Tensor], inputs_TD: Tensor, config: dict[str, Any]) -> Carving:
    """The closed form of design §4, carve, 1 to 4: split, fitted and balanced router, `down_proj` refitted.

    `weights` are gate_proj (I, D), up_proj (I, D) and down_proj (D, I), `inputs_TD` the MLP's normed inputs on
    calibration text, `config` the target's. The tokens should outnumber the neurons several times.
    """
    gate_ID, up_ID, down_DI = (weights[f"{name}_proj"].float() for name in ("gate", "up", "down"))
    activations_TI = F.silu(inputs_TD @ gate_ID.T) * (inputs_TD @ up_ID.T)
    shared, chosen = config["n_shared_experts"], config["num_experts_per_tok"]
    parts_PM = split(activations_TI, down_DI, shared, config["n_routed_experts"], config["moe_intermediate_size"])
    norms_TE = torch.stack(
        [(activations_TI[:, j] @ down_DI.T[j]).square().sum(-1) for j in (p[p >= 0] for p in parts_PM[shared:])], dim=1
    )
    rows_ED = fit_router(inputs_TD, norms_TE, chosen)
    gate, up, down = (_take(neurons_ID, parts_PM) for neurons_ID in (gate_ID, up_ID, down_DI.T))
    sample_TD = inputs_TD[:: max(1, len(inputs_TD) // _BALANCED_TOKENS)]
    carving = Carving(gate, up, down, rows_ED, balancing_bias(sample_TD, rows_ED, chosen))
    return refit_down(carving, inputs_TD, activations_TI @ down_DI.T, chosen)


def split(activations_TI: Tensor, down_DI: Tensor, n_shared: int, n_routed: int, width: int) -> Tensor:
    """Neurons (P, M) of each part; -1 where there are fewer neurons than places (design §4, carve, 1).

    C = |h| · ‖d‖, each token's C at norm 1. The neurons of highest mean C are shared; the others fall into balanced
    k-means clusters of the columns of C, each column at norm 1.
    """
    contributions_TI = F.normalize(activations_TI.abs() * down_DI.norm(dim=0), dim=1)
    order_I = contributions_TI.mean(0).argsort(descending=True)
    places = (n_shared + n_routed) * width
    assert len(order_I) <= places
    shared_J, routed_J = order_I.split([n_shared * width, len(order_I) - n_shared * width])
    clusters_J = balanced_clusters(F.normalize(contributions_TI[:, routed_J].T, dim=1), n_routed)
    parts_PM = torch.full((n_shared + n_routed, width), -1)
    parts_PM[:n_shared] = shared_J.view(n_shared, width)
    for expert in range(n_routed):
        members = routed_J[clusters_J == expert]
        parts_PM[n_shared + expert, : len(members)] = members
    return parts_PM


def balanced_clusters(points_JT: Tensor, clusters: int) -> Tensor:
    """Cluster (J,) of each point: k-means by cosine in which no cluster takes more than its equal share, rounded up.

    The first centres are far apart (each the point least like those before it); then the likest pairs of point and
    centre are joined first.
    """
    alike_JJ = points_JT @ points_JT.T
    centres = [int(alike_JJ.sum(0).argmin())]
    while len(centres) < clusters:
        centres.append(int(alike_JJ[centres].amax(0).argmin()))
    assigned_J = _fill_clusters(alike_JJ[:, centres])
    for _ in range(_CLUSTER_ROUNDS):
        member_JC = F.one_hot(assigned_J, clusters).to(points_JT)
        centre_CT = F.normalize(member_JC.T @ points_JT, dim=1)
        assigned_J = _fill_clusters(points_JT @ centre_CT.T)
    return assigned_J


def _fill_clusters(alike_JC: Tensor) -> Tensor:
    """Each point with its likest centre that still has room, the likest pairs first."""
    points, clusters = alike_JC.shape
    room = [-(-points // clusters)] * clusters
    assigned = [-1] * points
    for pair in alike_JC.flatten().argsort(descending=True, stable=True).tolist():
        point, cluster = divmod(pair, clusters)
        if assigned[point] < 0 and room[cluster]:
            assigned[point] = cluster
            room[cluster] -= 1
    return torch.tensor(assigned)


def fit_router(inputs_TD: Tensor, norms_TE: Tensor, chosen: int) -> Tensor:
    """Router rows (E, D): a ridge regression on the oracle, the K experts of largest ‖E_e(x)‖² (design §4, carve, 2).

    Scaled to logits of standard deviation 0.1 about each expert's mean, which the balancing bias makes up for.
    """
    oracle_TE = torch.zeros_like(norms_TE).scatter_(1, norms_TE.topk(chosen, dim=1).indices, 1.0)
    rows_ED = _ridge(inputs_TD, oracle_TE - oracle_TE.mean(0), _ROUTER_DAMPING).T
    logits_TE = inputs_TD @ rows_ED.T
    return rows_ED * (_ROUTER_SPREAD / (logits_TE - logits_TE.mean(0)).std().clamp(min=1e-12))


def refit_down(carving: Carving, inputs_TD: Tensor, outputs_TD: Tensor, chosen: int) -> Carving:
    """Every `down_proj` at once by least squares on the routed activations (design §4, carve, 4)."""
    hidden_TJ = _routed_activations(carving, inputs_TD, chosen)[0]
    down_JD = carving.down_PMD.flatten(0, 1)
    down_JD = down_JD + _ridge(hidden_TJ, outputs_TD - hidden_TJ @ down_JD, _REFIT_DAMPING)
    return carving._replace(down_PMD=down_JD.view_as(carving.down_PMD))


def apply_carving(carving: Carving, x_ND: Tensor, chosen: int) -> tuple[Tensor, Tensor]:
    """Output (N, D) and the number of tokens (E,) that each expert received; what the stock block computes.

    Every neuron runs for every token and unchosen experts weigh 0: at these sizes faster to train than sorted rows.
    """
    hidden_NJ, counts_E = _routed_activations(carving, x_ND, chosen)
    return hidden_NJ @ carving.down_PMD.flatten(0, 1), counts_E


def refine_carving(
    carving: Carving,
    weights: dict[str, Tensor],
    inputs_TD: Tensor,
    chosen: int,
    *,
    steps: int,
    generator: torch.Generator,
    batch_tokens: int = 2048,
    learning_rate: float = 3e-3,
) -> Carving:
    """The carved block, trained to give the dense MLP's outputs on the dense MLP's inputs (design §4, carve, 5).

    Adam, warm-up and cosine. The router learns more slowly than the experts, at which it only has to keep pace, and
    the bias is updated all along, at a speed that falls to zero.
    """
    carving = Carving(*(tensor.clone() for tensor in carving))
    parameters = [tensor.requires_grad_() for tensor in carving[:4]]
    bias_E = carving.bias_E
    rates = [learning_rate] * 3 + [min(learning_rate, _ROUTER_LEARNING_RATE)]
    groups = [{"params": [p], "lr": rate} for p, rate in zip(parameters, rates, strict=True)]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95), fused=True)
    schedule = warmed_cosine(optimizer, steps)
    for step in range(steps):
        x_ND = inputs_TD[torch.randint(len(inputs_TD), (batch_tokens,), generator=generator)]
        target_ND = swiglu(weights, x_ND)
        output_ND, counts_E = apply_carving(carving, x_ND, chosen)
        ((output_ND - target_ND).square().mean() / target_ND.square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        bias_E += _BALANCE_SPEED * (1 - step / steps) * torch.sign(counts_E.mean() - counts_E)
        bias_E -= bias_E.mean()
    return Carving(*(tensor.detach() for tensor in carving))


def relative_error(carving: Carving, weights: dict[str, Tensor], inputs_TD: Tensor, chosen: int) -> float:
    """E|MoE(x) - MLP(x)|² / E|MLP(x)|² over a sample."""
    target_TD = swiglu(weights, inputs_TD)
    error_TD = apply_carving(carving, inputs_TD, chosen)[0] - target_TD
    return float(error_TD.square().sum() / target_TD.square().sum().clamp(min=1e-30))


def swiglu(weights: dict[str, Tensor], x_ND: Tensor) -> Tensor:
    """The dense MLP (N, D)."""
    return (F.silu(x_ND @ weights["gate_proj"].T) * (x_ND @ weights["up_proj"].T)) @ weights["down_proj"].T


@torch.no_grad()
def load_carving(block: MixtureOfExperts, carving: Carving) -> None:
    """Put a carved MLP into the stock block."""
    shared = len(carving.gate_PMD) - len(carving.rows_ED)
    gate_PMD, up_PMD, down_PMD = carving[:3]
    block.shared_experts.gate_proj.weight.copy_(gate_PMD[:shared].flatten(0, 1))
    block.shared_experts.up_proj.weight.copy_(up_PMD[:shared].flatten(0, 1))
    block.shared_experts.down_proj.weight.copy_(down_PMD[:shared].flatten(0, 1).T)
    block.experts.gate_up_proj.copy_(torch.cat([gate_PMD[shared:], up_PMD[shared:]], dim=1))
    block.experts.down_proj.copy_(down_PMD[shared:].mT)
    block.gate.weight.copy_(carving.rows_ED)
    block.gate.e_score_correction_bias.copy_(carving.bias_E)


def _routed_activations(carving: Carving, x_ND: Tensor, chosen: int) -> tuple[Tensor, Tensor]:
    """Activations (N, P * M), each weighed as stock V3 weighs its expert (sigmoid scores, normalised over the chosen,
    scaling K), and the tokens (E,) of each expert."""
    scores_NE = (x_ND @ carving.rows_ED.T).sigmoid()
    indices_NK = (scores_NE.detach() + carving.bias_E).topk(chosen, dim=-1, sorted=False).indices
    mask_NE = torch.zeros_like(scores_NE).scatter_(1, indices_NK, 1.0)
    weights_NE = scores_NE * mask_NE
    weights_NE = chosen * weights_NE / weights_NE.sum(-1, keepdim=True)
    shared = len(carving.gate_PMD) - len(carving.rows_ED)
    weights_NP1 = F.pad(weights_NE, (shared, 0), value=1.0).unsqueeze(-1)
    hidden_NJ = F.silu(x_ND @ carving.gate_PMD.flatten(0, 1).T) * (x_ND @ carving.up_PMD.flatten(0, 1).T)
    hidden_NPM = hidden_NJ.unflatten(-1, carving.gate_PMD.shape[:2]) * weights_NP1
    return hidden_NPM.flatten(1), mask_NE.sum(0)


def _ridge(x_TF: Tensor, y_TO: Tensor, damping: float) -> Tensor:
    """(XᵀX + λI)⁻¹ XᵀY (F, O) in float64, λ a share of the mean diagonal."""
    x_TF, y_TO = x_TF.double(), y_TO.double()
    moment_FF = x_TF.T @ x_TF
    extra = damping * moment_FF.diagonal().mean() + 1e-300
    return torch.linalg.solve(moment_FF + extra * torch.eye(len(moment_FF)), x_TF.T @ y_TO).float()


def _take(neurons_ID: Tensor, parts_PM: Tensor) -> Tensor:
    """The parts' neurons (P, M, D), zero where there is none."""
    return torch.cat([neurons_ID, torch.zeros_like(neurons_ID[:1])])[parts_PM]

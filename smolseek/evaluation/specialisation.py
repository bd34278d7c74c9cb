"""How different the experts of a model are: in their weights, and in the tokens that they receive.

Both compare the experts of a layer. Where tokens take whole groups of experts, as in an upcycled model, they compare
the groups: copies of one MLP, each cut into experts alike.

Shapes: T tokens, N tokens in one row, V vocab_size, E n_routed_experts, P parts that are compared (experts or groups),
Z other numbers: those in one part, or the parts that a token chose.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from smolseek.evaluation.quality import window_size
from smolseek.generation import evaluating
from smolseek.model import DeepseekV3, StockModel
from smolseek.model.balance import expert_layers, routers, take_expert_counts
from smolseek.model.experts import TopkRouter
from smolseek.numerics.shards import whole
from smolseek.numerics.shares import ALONE, Shares


def measure_specialisation(
    model: DeepseekV3 | StockModel, ids_T: Tensor, *, shares: Shares = ALONE
) -> dict[str, dict[str, float]]:
    """Returns, per layer, `weights` (see `weight_distance`) and `routing` (see `routing_information`).

    The routing is that of `ids_T`, in the windows that `measure_quality` reads. A model without expert layers gives an
    empty mapping.
    """
    weights = layer_weight_distances(model)
    if not weights:
        return {}
    device, windows = next(model.parameters()).device, shares.in_step(ids_T.split(window_size([model])))
    with recorded_choices(model) as choices, evaluating(model):
        for window_T, _ in windows:
            model.hidden_states(window_T[None].to(device))
    take_expert_counts(model)
    counted_T = torch.cat([torch.full_like(window_T, counts, dtype=torch.bool) for window_T, counts in windows])
    tokens_T, routing = torch.cat([window_T for window_T, _ in windows])[counted_T].to(device), {}
    for layer, forwards in choices.items():
        chosen_TZ = torch.cat(forwards)[counted_T.to(device)]
        table_VE = torch.zeros(model.config.vocab_size, model.config.n_routed_experts, device=device)
        ones_TZ = torch.ones_like(chosen_TZ, dtype=table_VE.dtype)
        table_VE.index_put_((tokens_T[:, None].expand_as(chosen_TZ), chosen_TZ), ones_TZ, accumulate=True)
        shares.sum_(table_VE)
        routing[layer] = routing_information(table_VE)
    measures = {"weights": weights, "routing": routing}
    return {name: {str(layer): round(value, 4) for layer, value in values.items()} for name, values in measures.items()}


def weight_distance(parts_PZ: Tensor) -> float:
    """Returns the root of the mean |W_a - W_b|² over all pairs a ≠ b, over the root of the mean |W|².

    Equal parts give 0, unrelated ones √2.
    """
    return _distance(_spread_and_size(parts_PZ))


def _distance(spread_and_size_2: Tensor) -> float:
    spread, size = spread_and_size_2
    return float((2 * spread / size).sqrt())


def _spread_and_size(parts_PZ: Tensor) -> Tensor:
    """Returns half the mean |W_a - W_b|² over all pairs, and the mean |W|², (2,)."""
    parts_PZ, count = parts_PZ.float(), len(parts_PZ)
    spread = torch.linalg.vector_norm(parts_PZ - parts_PZ.mean(dim=0)).square() / (count - 1)
    return torch.stack([spread, torch.linalg.vector_norm(parts_PZ).square() / count])


def routing_information(counts_VP: Tensor) -> float:
    """Returns which share of the choice the token's identity explains: I(token; part) / H(part), 0 to 1.

    `counts_VP` is how often each vocabulary entry went to each part. The mutual information I is the Jensen-Shannon
    divergence between the parts' distributions of tokens, weighted by their loads. Its bias in a small sample is
    subtracted (Miller 1955).
    """
    counts_VP = counts_VP.cpu().double()  # MPS has no float64
    total = counts_VP.sum()
    entropies = [_entropy(counts / total) for counts in (counts_VP.sum(1), counts_VP.sum(0), counts_VP.flatten())]
    of_token, of_part, of_both = entropies
    tokens, parts, cells = (int((counts > 0).sum()) for counts in (counts_VP.sum(1), counts_VP.sum(0), counts_VP))
    information = of_token + of_part - of_both - (cells - tokens - parts + 1) / (2 * float(total))
    return min(1.0, max(0.0, information / of_part)) if of_part > 0 else 0.0


def _entropy(share: Tensor) -> float:
    """Returns the entropy in nats of shares that sum to 1."""
    return -float(torch.xlogy(share, share).sum())


@torch.no_grad()
def layer_weight_distances(model: nn.Module) -> dict[int, float]:
    """Returns `weight_distance` between the compared parts of each expert layer, by layer index."""
    distances = {}
    for layer, mixture in expert_layers(model).items():
        parts = compared_parts(mixture.gate)
        stacks = (mixture.experts.gate_up_proj, mixture.experts.down_proj)
        of_each = [_spread_and_size(whole(stack).reshape(parts, -1)) for stack in stacks]
        distances[layer] = _distance(torch.stack(of_each).sum(0))
    return distances


def compared_parts(router: TopkRouter) -> int:
    """Returns how many parts of a layer are compared: its groups where tokens take whole groups, else its experts."""
    return router.n_group if router.chooses_whole_groups else router.num_experts


@contextlib.contextmanager
def recorded_choices(model: nn.Module) -> Iterator[dict[int, list[Tensor]]]:
    """While open, collects per expert layer a tensor for each forward: which parts each token chose, (N, Z), sorted."""
    choices: dict[int, list[Tensor]] = {layer: [] for layer in routers(model)}

    def recorder(layer: int, router: TopkRouter) -> Any:
        size = router.num_experts // compared_parts(router)  # experts in a part; a token takes all of them
        return lambda module, inputs, output: choices[layer].append((output[1] // size).sort().values[:, ::size])

    handles = [router.register_forward_hook(recorder(layer, router)) for layer, router in routers(model).items()]
    try:
        yield choices
    finally:
        for handle in handles:
            handle.remove()

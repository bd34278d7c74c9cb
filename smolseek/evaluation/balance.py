"""The balance of the experts over a text, and how different they are.

Shapes: T tokens, K chosen experts, V vocabulary, E routed experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smolseek.evaluation.quality import window_size
from smolseek.generation import evaluating
from smolseek.model import DeepseekV3, StockModel
from smolseek.model.balance import (
    expert_weights,
    max_violation,
    recorded_choices,
    routing_information,
    take_expert_counts,
)


def measure_balance(model: DeepseekV3, ids_T: Tensor) -> dict[int, float]:
    """MaxVio of each expert layer over all of `ids_T`, in windows of 512 as `measure_quality` cuts them."""
    take_expert_counts(model)
    size = window_size([model])
    with evaluating(model), torch.inference_mode():
        for window_T in ids_T.split(size):
            model.hidden_states(window_T[None].to(next(model.parameters()).device))
    return {layer: max_violation(counts_E) for layer, counts_E in take_expert_counts(model)}


def measure_specialisation(model: DeepseekV3 | StockModel, ids_T: Tensor) -> dict[str, dict[str, float]]:
    """How different the experts are, per layer: `weights` (`balance.weights_apart`) and `routing`
    (`balance.routing_information` over `ids_T`, in windows of 512); empty without expert layers."""
    weights = expert_weights(model)
    if not weights:
        return {}
    size, device = window_size([model]), next(model.parameters()).device
    with recorded_choices(model) as choices, evaluating(model), torch.inference_mode():
        for window_T in ids_T.split(size):
            model.hidden_states(window_T[None].to(device))
    take_expert_counts(model)
    tokens_T, routing = ids_T.to(device), {}
    for layer, parts in choices.items():
        copies_TK = torch.cat(parts)
        table_VE = torch.zeros(model.config.vocab_size, model.config.n_routed_experts, device=device)
        ones = torch.ones_like(copies_TK, dtype=table_VE.dtype)
        table_VE.index_put_((tokens_T[:, None].expand_as(copies_TK), copies_TK), ones, accumulate=True)
        routing[layer] = routing_information(table_VE)
    named = {"weights": weights, "routing": routing}
    return {name: {str(layer): round(value, 4) for layer, value in by.items()} for name, by in named.items()}

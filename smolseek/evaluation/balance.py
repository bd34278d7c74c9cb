"""The balance of the experts over a text. Shapes: T tokens, E n_routed_experts."""

from __future__ import annotations

import torch
from torch import Tensor

from smolseek.evaluation.quality import window_size
from smolseek.generation import evaluating
from smolseek.model import DeepseekV3
from smolseek.model.balance import max_violation, take_expert_counts


def measure_balance(model: DeepseekV3, ids_T: Tensor) -> dict[int, float]:
    """Returns MaxVio of each expert layer over all of `ids_T`, in the windows that `measure_quality` reads."""
    take_expert_counts(model)
    size = window_size([model])
    with evaluating(model), torch.inference_mode():
        for window_T in ids_T.split(size):
            model.hidden_states(window_T[None].to(next(model.parameters()).device))
    return {layer: max_violation(counts_E) for layer, counts_E in take_expert_counts(model)}

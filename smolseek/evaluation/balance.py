"""The balance of the experts over a text. Shapes: T tokens, E n_routed_experts."""

from __future__ import annotations

from torch import Tensor

from smolseek.evaluation.quality import window_size
from smolseek.generation import evaluating
from smolseek.model import DeepseekV3
from smolseek.model.balance import max_violation, take_expert_counts
from smolseek.numerics.shares import ALONE, Shares


def measure_balance(model: DeepseekV3, ids_T: Tensor, *, shares: Shares = ALONE) -> dict[int, float]:
    """Returns MaxVio of each expert layer over all of `ids_T`, in the windows that `measure_quality` reads."""
    take_expert_counts(model)
    totals: dict[int, Tensor] = {}
    with evaluating(model):
        for window_T, counts in shares.in_step(ids_T.split(window_size([model]))):
            model.hidden_states(window_T[None].to(next(model.parameters()).device))
            for layer, counts_E in take_expert_counts(model):
                totals[layer] = totals.get(layer, 0 * counts_E) + counts_E * counts
        for counts_E in totals.values():
            shares.sum_(counts_E)
    return {layer: max_violation(counts_E) for layer, counts_E in totals.items()}

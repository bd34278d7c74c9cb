"""How a run balances its experts: what the routers are told, the speed of the bias updates, the load in the metrics.

`smolseek.model.balance` has the rule itself. Shapes: E n_routed_experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from smolseek.config import TrainSettings
from smolseek.model.balance import max_violation, routers
from smolseek.model.balance_loss import own_counts

DEFAULT_UPDATE_SPEED = 1e-3
"""u where a recipe names none: that of DeepSeek-V3, section 4.2."""
LAST_SIGN_SPEED = 0.2
"""Share of u at which the sign rule ends."""


def set_balance(model: nn.Module, settings: TrainSettings, sum_counts: Callable[[Tensor], Tensor] = own_counts) -> None:
    """Give every router the balance loss that the settings name; `sum_counts` adds a tensor up over the processes.

    Each micro-batch has a loss of its own, so the weight is divided by their number: a global batch gets the mean.
    """
    for router in routers(model).values():
        router.sum_counts = sum_counts
        router.balance_loss_weight = settings.balance_loss_weight / settings.gradient_accumulation
        router.balance_loss_over_batch = settings.balance_loss == "batch"


def balance_speed(step: int, settings: TrainSettings, decay: float) -> float:
    """Returns u at a step: 0 in the last `balance_freeze_share` of the run (DeepSeek-V3, section 4.2: its last 3%).

    The sign rule's steps do not shrink near balance. Its u therefore falls with the learning rate: `decay` is the
    learning rate's share of its peak, and at `decay` 0 the share of u is `LAST_SIGN_SPEED`. (DeepSeek-V3 keeps u.)
    """
    if step >= settings.steps * (1 - settings.balance_freeze_share):
        return 0.0
    given = settings.balance_update_speed
    speed = DEFAULT_UPDATE_SPEED if given is None else given
    return speed * (LAST_SIGN_SPEED + (1 - LAST_SIGN_SPEED) * decay) if settings.balance_rule == "sign" else speed


def describe_load(counts: Iterable[tuple[int, Tensor]]) -> dict[str, Any]:
    """Returns MaxVio and every expert's share of the choices, per layer, for a line of metrics.

    `counts` has a (layer index, counts (E,)) for each layer with experts; without any, nothing is returned.
    """
    by_layer = {str(layer): counts_E for layer, counts_E in counts}
    if not by_layer:
        return {}
    shares = {layer: (counts_E / counts_E.sum()).tolist() for layer, counts_E in by_layer.items()}
    return {
        "maxvio": {layer: round(max_violation(counts_E), 4) for layer, counts_E in by_layer.items()},
        "load": {layer: [round(share, 4) for share in layer_shares] for layer, layer_shares in shares.items()},
    }

"""Loss-less load balancing (DeepSeek-V3, section 2.1.2; Wang et al. 2024, algorithm 1), outside autograd and forward.

Shapes: E routed experts.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from smolseek.model.experts import MixtureOfExperts, TopkRouter
from smolseek.model.transformer import DecoderLayer


def _routers(model: nn.Module) -> dict[int, TopkRouter]:
    layers = (module for module in model.modules() if isinstance(module, DecoderLayer))
    return {layer.layer_index: layer.mlp.gate for layer in layers if isinstance(layer.mlp, MixtureOfExperts)}


def take_expert_counts(model: nn.Module) -> list[tuple[int, Tensor]]:
    """(layer index, tokens each expert received (E,), int64) of every forward since the last call, and starts afresh;
    empty for a model without routers."""
    counts = [(index, router.expert_counts.clone()) for index, router in _routers(model).items()]
    for router in _routers(model).values():
        router.expert_counts.zero_()
    return counts


@torch.no_grad()
def update_biases(model: nn.Module, counts: Iterable[tuple[int, Tensor]], update_speed: float) -> None:
    """b += update_speed * sign(mean load - load), then mean-centred (only differences choose; the paper lets it drift).

    `counts` are those of `take_expert_counts`, summed over the whole global batch.
    """
    routers = _routers(model)
    for index, counts_E in counts:
        bias_E = routers[index].e_score_correction_bias
        load_E = counts_E.to(bias_E)
        bias_E += update_speed * torch.sign(load_E.mean() - load_E)
        bias_E -= bias_E.mean()


def max_violation(counts_E: Tensor) -> float:
    """MaxVio = (max load - mean load) / mean load (Wang et al. 2024, equation 4); 0 is balanced.

    Raises ValueError when no token was routed.
    """
    mean = counts_E.cpu().double().mean().item()  # MPS has no float64
    if mean == 0:
        raise ValueError("no token was routed: run the model before measuring its balance")
    return counts_E.max().item() / mean - 1

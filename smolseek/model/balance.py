"""Auxiliary-loss-free load balancing: the rule that moves a router's biases, and the counts that the rule needs.

Source: DeepSeek-V3, section 2.1.2; Wang et al. 2024, arXiv:2408.15664. The original description of this project calls
it "loss-less". Autograd takes no part in it. `smolseek.training.balancing` has the speed over the steps of a run.

Shapes: E n_routed_experts.
"""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from smolseek.model.experts import MixtureOfExperts, TopkRouter
from smolseek.model.transformer import DecoderLayer

BalanceRule = Literal["sign", "proportional"]


def expert_layers(model: nn.Module) -> dict[int, MixtureOfExperts]:
    """Returns the model's mixtures of experts by layer index; empty for a dense model or another class of model."""
    layers = (module for module in model.modules() if isinstance(module, DecoderLayer))
    return {layer.layer_index: layer.mlp for layer in layers if isinstance(layer.mlp, MixtureOfExperts)}


def routers(model: nn.Module) -> dict[int, TopkRouter]:
    """Returns the routers of `expert_layers` by layer index."""
    return {layer: mixture.gate for layer, mixture in expert_layers(model).items()}


def take_expert_counts(model: nn.Module) -> list[tuple[int, Tensor]]:
    """Returns (layer index, number of tokens that each expert received (E,), int64) and sets the counts to zero.

    The counts add up all forwards since the last call. A model without routers gives an empty list.
    """
    counts = []
    for layer, router in routers(model).items():
        counts.append((layer, router.expert_counts.clone()))
        router.expert_counts.zero_()
    return counts


def next_bias(bias_E: Tensor, counts_E: Tensor, update_speed: float, rule: BalanceRule = "sign") -> Tensor:
    """Returns the bias (E,) after one update by `rule`, in the dtype of `bias_E`.

    With load c, mean load c̄ and u = `update_speed`:

    - sign: b + u · sign(c̄ - c) (DeepSeek-V3, section 2.1.2; Wang et al. 2024, algorithm 1);
    - proportional: b + u · (c̄ - c) / c̄ (Wang et al. 2024 try it with absolute loads).

    Then the mean is subtracted, because only differences between biases choose experts; the papers let the mean drift.
    """
    load_E = counts_E.to(bias_E)
    mean = load_E.mean()
    step_E = torch.sign(mean - load_E) if rule == "sign" else 1 - load_E / mean.clamp(min=1e-9)
    moved_E = bias_E + update_speed * step_E
    return moved_E - moved_E.mean()


@torch.no_grad()
def update_biases(
    model: nn.Module, counts: Iterable[tuple[int, Tensor]], update_speed: float, rule: BalanceRule = "sign"
) -> None:
    """Give every router named in `counts` its `next_bias`; at speed 0 nothing moves, and nothing is mean-centred.

    `counts` comes from `take_expert_counts`, summed over the whole global batch.
    """
    if not update_speed:
        return
    by_layer = routers(model)
    for layer, counts_E in counts:
        bias_E = by_layer[layer].e_score_correction_bias
        bias_E.copy_(next_bias(bias_E, counts_E, update_speed, rule))


def max_violation(counts_E: Tensor) -> float:
    """Returns MaxVio = (max load - mean load) / mean load (Wang et al. 2024, equation 4); 0 is balanced.

    Raises ValueError when no token was routed.
    """
    mean = counts_E.cpu().double().mean().item()  # MPS has no float64
    if mean == 0:
        raise ValueError("no token was routed: run the model before measuring its balance")
    return counts_E.max().item() / mean - 1

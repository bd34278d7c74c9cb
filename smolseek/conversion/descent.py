"""How converted weights are trained: an optimizer with relative rates, and latents at a scale that can move."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from smolseek.conversion.mla.heads import CONSTANT
from smolseek.model.attention import MultiheadLatentAttention
from smolseek.numerics.muon import Muon
from smolseek.numerics.schedule import warmed_cosine
from smolseek.numerics.shares import ALONE, Shares

_ROUTER_FACTOR = 5.0  # a fitted router starts small, and has to keep pace with its experts
_MUON_RMS = 0.2  # root mean square of a Muon update at learning rate 1, as torch scales it to match AdamW's


class Descent:
    """An optimizer whose step moves each parameter by `rate` of its own root mean square, with its schedule.

    The rate is relative because checkpoints differ in the scale of their weights, and so do the matrices of one block.
    It warms up over the first twentieth of the steps and falls to zero by a cosine. The optimizer is Adam, or Muon
    where a number of heads is given. Several processes take every step together, each with the gradient of its rows.
    What is `held`, parts of parameters by index, stays as it is.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        *,
        rate: float,
        steps: int,
        muon_heads: int | None = None,
        held: Iterable[tuple[Tensor, Any]] = (),
        shares: Shares = ALONE,
    ) -> None:
        self.parameters, self.held, self.shares = list(parameters.values()), list(held), shares
        groups = []
        for name, parameter in parameters.items():
            parameter.requires_grad_(True)
            size = max(float(parameter.detach().square().mean().sqrt()), 1e-8)
            factor = _ROUTER_FACTOR if name.endswith("mlp.gate.weight") else 1 / _MUON_RMS if muon_heads else 1.0
            groups.append({"params": [(name, parameter) if muon_heads else parameter], "lr": rate * size * factor})
        self.optimizer: torch.optim.Optimizer = (
            Muon(groups, heads=muon_heads) if muon_heads else torch.optim.Adam(groups, betas=(0.9, 0.95), fused=True)
        )
        self.schedule = warmed_cosine(self.optimizer, steps)

    def step(self, loss: Tensor | None) -> None:
        """One step down: along the mean over the processes; no loss where one has no rows."""
        if loss is not None:
            loss.backward()
            for parameter, part in self.held:
                if parameter.grad is not None:
                    parameter.grad[part] = 0
        self.shares.mean_gradients_(self.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)

    def end(self) -> None:
        """Freeze the parameters again."""
        for parameter in self.parameters:
            parameter.requires_grad_(False)


@torch.no_grad()
def scale_latents(block: MultiheadLatentAttention, factor: float) -> None:
    """Multiply the inputs of the latent norms, which changes nothing behind them.

    A latent at `LATENT_RMS` is safe from every eps, but its encoder would stand still beside other weights in training.
    """
    for name, tensor in block.named_parameters():
        if name.startswith("kv_a_proj_with_mqa"):
            tensor[: block.kv_lora_rank].mul_(factor)
        elif name.startswith("q_a_proj"):
            tensor.mul_(factor)


def constants(block: MultiheadLatentAttention) -> list[tuple[Tensor, Any]]:
    """Returns what holds the constant coordinate of an exact query latent (`mla.heads.exact_query`); else nothing.

    Behind it stand the queries' biases, in a column of q_b_proj whose entries are thousands of times smaller than the
    others'. A step by the size of the whole matrix would be one of thousands of biases.
    """
    bias = block.q_a_proj.bias if block.q_lora_rank is not None else None
    if bias is None or not bool((bias >= CONSTANT / 2).any()):
        return []
    return [(block.q_a_proj.bias, ...), (block.q_b_proj.weight, (slice(None), bias >= CONSTANT / 2))]

"""Muon on named matrices and stacks of them, each matrix updated as if it were the only one.

Shapes: P parts (the matrices of one parameter), O outputs and A inputs of a linear map.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from smolseek.numerics.precision import has_bfloat16
from smolseek.numerics.slices import even_slices


class Muon(torch.optim.Muon):
    """Muon (Jordan 2024) on named matrices and stacks of them, each matrix updated as if it were the only one.

    A step has the root mean square of an AdamW step (Liu et al. 2025, section 2.2), so that both can share a learning
    rate. torch's own Muon takes 2-D parameters only, so it gets views, which share the weights' memory. This class
    steps all matrices of a parameter together, in fp32 where the device has no units for bf16. With `heads` above 1,
    each head's part of an attention projection counts as a matrix of its own.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, lr: float = 1e-3, heads: int = 1) -> None:
        self.origins: dict[Tensor, tuple[nn.Parameter, tuple[Any, ...]]] = {}
        """For each view: its parameter, and its index in the parameter."""
        for group in (groups := [dict(group) for group in groups]):
            parts = [(p, index) for name, p in group["params"] for index in matrix_indices(name, p, heads)]
            views = [nn.Parameter(p.detach()[index]) for p, index in parts]
            self.origins |= dict(zip(views, parts, strict=True))
            group["params"] = views
        super().__init__(groups, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take one step with the gradients of the parameters that the views belong to."""
        assert closure is None
        for group in self.param_groups:
            for _, views in itertools.groupby(group["params"], lambda view: id(self.origins[view][0])):
                self._step(group, list(views))

    def _step(self, group: dict[str, Any], views: list[Tensor]) -> None:
        """Take one step of the matrices of one parameter, which have one shape."""
        grad = self.origins[views[0]][0].grad
        if grad is None:
            return
        grads = [grad[self.origins[view][1]] for view in views]
        for view in views:
            if not self.state[view]:
                self.state[view]["momentum_buffer"] = torch.zeros_like(view)
        momenta = [self.state[view]["momentum_buffer"] for view in views]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        updates_POA = torch.stack(torch._foreach_lerp(grads, momenta, group["momentum"]))  # Nesterov's
        exact = not has_bfloat16(grad.device)
        made_POA = orthogonal(updates_POA if exact else updates_POA.bfloat16(), group["ns_coefficients"], group["eps"])
        torch._foreach_mul_(views, 1 - group["lr"] * group["weight_decay"])
        rate = group["lr"] * 0.2 * math.sqrt(max(views[0].shape))
        torch._foreach_add_(views, made_POA.to(grad.dtype).unbind(), alpha=-rate)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of the parameters that the views belong to."""
        for parameter, _ in self.origins.values():
            parameter.grad = None


def orthogonal(update_POA: Tensor, coefficients: tuple[float, float, float], eps: float) -> Tensor:
    """Returns each of P matrices with its singular values moved near 1, by five Newton-Schulz steps (Jordan 2024)."""
    a, b, c = coefficients
    tall = update_POA.shape[1] > update_POA.shape[2]
    x_POA = update_POA.mT if tall else update_POA
    x_POA = x_POA / x_POA.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(5):
        gram_POO = x_POA @ x_POA.mT
        x_POA = torch.baddbmm(x_POA, torch.baddbmm(gram_POO, gram_POO, gram_POO, beta=b, alpha=c), x_POA, beta=a)
    return x_POA.mT if tall else x_POA


def matrix_indices(name: str, parameter: Tensor, heads: int = 1) -> Iterator[tuple[Any, ...]]:
    """Yields the index of each matrix in a parameter.

    A stack has a matrix per expert; stacked gate and up projections are two; an attention projection has one per head.
    """
    *stack, rows, columns = parameter.shape
    words = set(name.split("."))
    if "o_proj" in words:
        parts: list[tuple[slice, ...]] = [(slice(None), part) for part in even_slices(columns, heads)]
    else:
        count = 2 if "gate_up_proj" in words else heads if words & {"q_proj", "q_b_proj", "kv_b_proj"} else 1
        parts = [(part,) for part in even_slices(rows, count)]
    for expert in range(stack[0]) if stack else [None]:
        for part in parts:
            yield part if expert is None else (expert, *part)

"""Muon on named matrices and stacks of them, each matrix updated as if it stood alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from smolseek.numerics.precision import has_bfloat16


class Muon(torch.optim.Muon):
    """Muon (Jordan 2024) on named matrices and stacks of them, each matrix updated as if it stood alone.

    A step has the root mean square that one of AdamW has (Liu et al. 2025, section 2.2), so that both can share a
    learning rate. torch's own takes 2-D parameters only: it is given views, which share the weights' memory. Its step
    is taken here for all matrices of a parameter together, and in fp32 where the device has no units for bf16. With a
    number of `heads`, each head's part of an attention block counts as a matrix of its own.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, lr: float = 1e-3, heads: int = 1) -> None:
        self.wholes: dict[Tensor, tuple[nn.Parameter, tuple[Any, ...]]] = {}
        for group in (groups := [dict(group) for group in groups]):
            parts = [(p, index) for name, p in group["params"] for index in matrices_of(name, p, heads)]
            views = [nn.Parameter(p.detach()[index]) for p, index in parts]
            self.wholes |= dict(zip(views, parts, strict=True))
            group["params"] = views
        super().__init__(groups, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step by the gradients of the weights that the views look into."""
        assert closure is None
        for group in self.param_groups:
            for _, views in itertools.groupby(group["params"], lambda view: id(self.wholes[view][0])):
                self._step(group, list(views))

    def _step(self, group: dict[str, Any], views: list[Tensor]) -> None:
        """One step of the matrices of one parameter, which are of one shape."""
        grad = self.wholes[views[0]][0].grad
        if grad is None:
            return
        grads = [grad[self.wholes[view][1]] for view in views]
        for view in views:
            if not self.state[view]:
                self.state[view]["momentum_buffer"] = torch.zeros_like(view)
        momenta = [self.state[view]["momentum_buffer"] for view in views]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        updates_MRC = torch.stack(torch._foreach_lerp(grads, momenta, group["momentum"]))  # Nesterov's
        exact = not has_bfloat16(grad.device)
        made_MRC = orthogonal(updates_MRC if exact else updates_MRC.bfloat16(), group["ns_coefficients"], group["eps"])
        torch._foreach_mul_(views, 1 - group["lr"] * group["weight_decay"])
        rate = group["lr"] * 0.2 * math.sqrt(max(views[0].shape))
        torch._foreach_add_(views, made_MRC.to(grad.dtype).unbind(), alpha=-rate)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of the weights themselves."""
        for whole, _ in self.wholes.values():
            whole.grad = None


def orthogonal(update_MRC: Tensor, coefficients: tuple[float, float, float], eps: float) -> Tensor:
    """Each of M matrices (R, C) with its singular values near 1: five steps of Newton and Schulz (Jordan 2024)."""
    a, b, c = coefficients
    tall = update_MRC.shape[1] > update_MRC.shape[2]
    x_MRC = update_MRC.mT if tall else update_MRC
    x_MRC = x_MRC / x_MRC.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(5):
        gram_MRR = x_MRC @ x_MRC.mT
        x_MRC = torch.baddbmm(x_MRC, torch.baddbmm(gram_MRR, gram_MRR, gram_MRR, beta=b, alpha=c), x_MRC, beta=a)
    return x_MRC.mT if tall else x_MRC


def matrices_of(name: str, parameter: Tensor, heads: int = 1) -> Iterator[tuple[Any, ...]]:
    """Indices of the matrices in a parameter: one an expert, gate and up apart where they are stacked, one a head."""
    *stack, rows, columns = parameter.shape
    words = set(name.split("."))
    if "o_proj" in words:
        parts: list[tuple[slice, ...]] = [(slice(None), part) for part in _slices(columns, heads)]
    else:
        count = 2 if "gate_up_proj" in words else heads if words & {"q_proj", "q_b_proj", "kv_b_proj"} else 1
        parts = [(part,) for part in _slices(rows, count)]
    for expert in range(stack[0]) if stack else [None]:
        for part in parts:
            yield part if expert is None else (expert, *part)


def _slices(size: int, count: int) -> list[slice]:
    return [slice(size * i // count, size * (i + 1) // count) for i in range(count)]

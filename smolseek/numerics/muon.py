"""Muon on named matrices and stacks of them, each matrix updated as if it were the only one.

Shapes: P parts (the matrices of one batch), O outputs and A inputs of a linear map, o of the outputs in one process.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from smolseek.numerics.precision import has_bfloat16
from smolseek.numerics.shards import local
from smolseek.numerics.whole_matrices import gather_own, row_group, scatter_rows

_NEWTON_SCHULZ = (3.4445, -4.775, 2.0315)
"""Coefficients of a Newton-Schulz step (Jordan 2024)."""
Named = tuple[str, nn.Parameter]


class Muon(torch.optim.Optimizer):
    """Muon (Jordan 2024) on named matrices and stacks of them, each matrix updated as if it were the only one.

    A step has the root mean square of an AdamW step (Liu et al. 2025, section 2.2), so that both can share a learning
    rate. The step is computed in fp32 where the device has no units for bf16. With `heads` above 1, each head's part of
    an attention projection counts as a matrix of its own.

    A sharded parameter's momentum is sharded as the parameter is. Only the Newton-Schulz iteration needs whole
    matrices: one process gathers a matrix, iterates and scatters the update.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, lr: float = 1e-3, heads: int = 1) -> None:
        self.heads = heads
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0, "momentum": 0.95})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take one step with the gradients of the parameters."""
        assert closure is None
        for group in self.param_groups:
            named = zip(group["param_names"], group["params"], strict=True)
            for batch in self._batches([(name, p) for name, p in named if p.grad is not None]):
                self._step(group, batch)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a saved state.

        Raises:
            ValueError: it has a momentum for each matrix, as the first version of smolseek saved it.
        """
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        momenta = {index: state["momentum_buffer"] for index, state in state_dict["state"].items()}
        if any(index >= len(parameters) or m.shape != parameters[index].shape for index, m in momenta.items()):
            raise ValueError(
                "training state: Muon's momentum lies there matrix by matrix, as an earlier version saved it; go on "
                "with that version, or start over with --force"
            )
        super().load_state_dict(state_dict)

    def _batches(self, named: list[Named]) -> Iterator[list[Named]]:
        """Yields parameters to step together: one, or as many of one kind as give every process a matrix to iterate."""
        kinds: dict[Any, list[Named]] = {}
        for name, p in named:
            group = row_group(p)
            kind = (group.group_name, p.shape, matrix_parts(name, self.heads)) if group else id(p)
            kinds.setdefault(kind, []).append((name, p))
        for alike in kinds.values():
            group, matrices = row_group(alike[0][1]), math.prod(local(alike[0][1]).shape[:-2])
            count = max(1, group.size() // matrices) if group else 1
            yield from (alike[start : start + count] for start in range(0, len(alike), count))

    def _step(self, group: dict[str, Any], batch: list[Named]) -> None:
        """Take one step of parameters of one kind."""
        updates = []
        for _, p in batch:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            grad, momentum = local(p.grad), local(self.state[p]["momentum_buffer"])
            momentum.lerp_(grad, 1 - group["momentum"])
            updates.append(grad.lerp(momentum, group["momentum"]))  # Nesterov's
        name, first = batch[0]
        for (_, p), made in zip(batch, self._made(name, first, updates), strict=True):
            sizes = (size // parts for size, parts in zip(p.shape[-2:], matrix_parts(name, self.heads), strict=True))
            rate = group["lr"] * 0.2 * math.sqrt(max(sizes))
            local(p).mul_(1 - group["lr"] * group["weight_decay"]).add_(made.to(p.dtype), alpha=-rate)

    def _made(self, name: str, like: nn.Parameter, updates: list[Tensor]) -> Iterable[Tensor]:
        """Returns this process's part of the updates, with the matrices made orthogonal."""
        exact = not has_bfloat16(updates[0].device)
        if not exact:
            updates = [update.bfloat16() for update in updates]
        processes = row_group(like)
        if processes is None:
            return [self._orthogonal(name, update) for update in updates]
        shards_PoA = torch.cat([update if update.dim() == 3 else update.unsqueeze(0) for update in updates])
        own_POA = self._orthogonal(name, gather_own(shards_PoA, like.shape[-2], processes))
        made_PoA = scatter_rows(own_POA, shards_PoA.shape, processes)
        return [made.view_as(update) for made, update in zip(made_PoA.chunk(len(updates)), updates, strict=True)]

    def _orthogonal(self, name: str, update: Tensor) -> Tensor:
        """Returns a matrix or stack whose matrices, as `matrix_parts` cuts them, are made orthogonal."""
        if not update.numel():
            return update
        (rows, columns), (down, across) = update.shape[-2:], matrix_parts(name, self.heads)
        cut = update.reshape(-1, down, rows // down, across, columns // across).transpose(2, 3)
        made_POA = orthogonal(cut.flatten(0, 2))
        return made_POA.view(cut.shape).transpose(2, 3).reshape(update.shape)


def orthogonal(
    update_POA: Tensor, coefficients: tuple[float, float, float] = _NEWTON_SCHULZ, eps: float = 1e-7
) -> Tensor:
    """Returns each of P matrices with its singular values moved near 1, by five Newton-Schulz steps (Jordan 2024)."""
    a, b, c = coefficients
    tall = update_POA.shape[1] > update_POA.shape[2]
    x_POA = update_POA.mT if tall else update_POA
    x_POA = x_POA / x_POA.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(5):
        gram_POO = x_POA @ x_POA.mT
        x_POA = torch.baddbmm(x_POA, torch.baddbmm(gram_POO, gram_POO, gram_POO, beta=b, alpha=c), x_POA, beta=a)
    return x_POA.mT if tall else x_POA


def matrix_parts(name: str, heads: int = 1) -> tuple[int, int]:
    """Returns into how many matrices a parameter's rows and columns are cut, in a stack those of each expert.

    Stacked gate and up projections are two; an attention projection has one per head.
    """
    words = set(name.split("."))
    if "o_proj" in words:
        return 1, heads
    return 2 if "gate_up_proj" in words else heads if words & {"q_proj", "q_b_proj", "kv_b_proj"} else 1, 1

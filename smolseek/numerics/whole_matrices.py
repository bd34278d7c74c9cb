"""Whole matrices from rows that several processes hold, each matrix in one process only.

Shapes: P parts (matrices), O outputs (their rows), o of these in one process, A inputs (their columns).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from smolseek.numerics.slices import even_slices


def row_group(parameter: Any) -> Any:
    """Returns the process group that divides the rows of a parameter's matrices; None if matrices are whole.

    A stack of experts that is divided by experts has whole matrices.
    """
    for axis, placement in enumerate(getattr(parameter, "placements", ())):
        if placement.is_shard() and parameter.device_mesh.size(axis) > 1:
            assert placement.dim < parameter.dim() - 1, "columns are never divided"
            if placement.dim == parameter.dim() - 2:
                return parameter.device_mesh.get_group(axis)
    return None


def gather_own(shards_PoA: Tensor, rows: int, group: Any) -> Tensor:
    """Returns the whole matrices that fall to this process, (P / processes, O, A), from every process's rows of P.

    Every process of the group must call it, with the same P. `rows` is O.
    """
    rank, columns = group.rank(), shards_PoA.shape[2]
    taken, held = _matrices_of(len(shards_PoA), group), _rows_of(rows, group)
    sent = [count * held[rank] * columns for count in taken]
    received = [taken[rank] * count * columns for count in held]
    parts = _exchange(shards_PoA, sent, received, group).split(received)
    return torch.cat([part.view(taken[rank], count, columns) for part, count in zip(parts, held, strict=True)], dim=1)


def scatter_rows(own_POA: Tensor, shape_PoA: torch.Size, group: Any) -> Tensor:
    """Returns this process's rows of all matrices, (P, t, A), from those that `gather_own` gave to each process."""
    count, own_rows, columns = shape_PoA
    taken, held = _matrices_of(count, group), _rows_of(own_POA.shape[1], group)
    sent = [len(own_POA) * rows * columns for rows in held]
    received = [matrices * own_rows * columns for matrices in taken]
    flat = torch.cat([part_PoA.flatten() for part_PoA in own_POA.split(held, dim=1)])
    return _exchange(flat, sent, received, group).view(shape_PoA)


def _matrices_of(count: int, group: Any) -> list[int]:
    """Returns how many of the matrices fall to each process."""
    return [part.stop - part.start for part in even_slices(count, group.size())]


def _rows_of(rows: int, group: Any) -> list[int]:
    """Returns how many rows each process holds, by the rule of `torch.chunk`, as FSDP2 divides them."""
    size = -(-rows // group.size())
    return [max(0, min(size, rows - rank * size)) for rank in range(group.size())]


def _exchange(numbers: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
    """Returns the numbers that the processes send to this one, one after the other (all-to-all)."""
    from torch.distributed import all_to_all_single

    result = numbers.new_empty(sum(received))
    all_to_all_single(result, numbers.flatten(), received, sent, group=group)
    return result

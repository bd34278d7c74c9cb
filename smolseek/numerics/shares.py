"""How processes divide a computation and stay in step; a single process has all of it.

Every process calls the same methods in the same order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

_PATIENCE = timedelta(days=365)
"""How long a process waits for what another one computes alone. A process that ends is noticed at once."""

Value = TypeVar("Value")
Item = TypeVar("Item")
Rows = TypeVar("Rows", Tensor, tuple[Any, ...], range)


class FailedElsewhere(ValueError):
    """Another process failed, and tells why; this one need not."""


class Shares:
    """All the work, where one process does it. `GroupShares` divides it."""

    rank, size = 0, 1

    @property
    def leads(self) -> bool:
        """Whether this process writes files and tells of progress."""
        return self.rank == 0

    def own(self, rows: Rows) -> Rows:
        """Returns this process's share of a batch's rows, or of parts that lie in order; it may be empty."""
        return rows[self.rank :: self.size]

    def in_step(self, items: Sequence[Item]) -> list[tuple[Item, bool]]:
        """Returns this process's share of some items, each with whether it counts; all processes get equally many.

        A model that is divided among processes runs in all of them at once. So where a process has no item left, it
        gets the last one once more, which does not count.
        """
        rounds, last = -(-len(items) // self.size), len(items) - 1
        numbers = range(self.rank, rounds * self.size, self.size)
        return [(items[min(number, last)], number <= last) for number in numbers]

    def by_leader(self, compute: Callable[[], Value]) -> Value:
        """Returns in every process what `compute` returns in the leading one; the others wait, however long it takes.

        The value can be pickled, and its tensors lie on the CPU.

        Raises:
            FailedElsewhere: in the others, when the leading process fails.
        """
        return compute()

    def after_leader(self, compute: Callable[[], Value]) -> Value:
        """Returns what `compute` returns here; the leading process computes first, so that others find it downloaded.

        Raises:
            FailedElsewhere: in the others, when the leading process fails.
        """
        return compute()

    def each(self, compute: Callable[[Item], Value], items: Sequence[Item]) -> list[Value]:
        """Returns in every process what `compute` returns for each item, and computes a share of them.

        Values are as in `by_leader`.

        Raises:
            FailedElsewhere: in the others, when one process fails.
        """
        return [compute(item) for item in items]

    def sum_(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over the processes."""

    def complete_(self, parts: Sequence[Tensor]) -> None:
        """Fill the parts, of which each process has computed its own (`own`), with those of the others."""

    def mean_gradients_(self, parameters: Iterable[Tensor], weight: Tensor | float) -> None:
        """Replace gradients by their weighted mean; `weight` is this process's, 0 where it has no rows."""

    def wait(self) -> None:
        """Wait until every process is here, however long it takes."""


ALONE = Shares()
"""Those of a single process."""


class GroupShares(Shares):
    """The share of one process of torch.distributed's default group, which must be there."""

    def __init__(self) -> None:
        from torch.distributed import get_rank, get_world_size

        self.rank, self.size = get_rank(), get_world_size()

    @functools.cached_property
    def patient(self) -> Any:
        """The group that waits for single processes. The default one has a time-out, for steps that all take."""
        from torch.distributed import new_group

        return new_group(backend="gloo", timeout=_PATIENCE)

    def by_leader(self, compute: Callable[[], Value]) -> Value:
        return self._tell(_outcome(compute) if self.leads else None, 0)

    def after_leader(self, compute: Callable[[], Value]) -> Value:
        computed: list[Value] = []
        self.by_leader(lambda: computed.append(compute()))
        value = computed[0] if self.leads else compute()
        self.wait()  # the leading process could change what the others still read
        return value

    def each(self, compute: Callable[[Item], Value], items: Sequence[Item]) -> list[Value]:
        own = {index: _outcome(compute, items[index]) for index in self.own(range(len(items)))}
        return [self._tell(own.get(index), index % self.size) for index in range(len(items))]

    def sum_(self, tensor: Tensor) -> None:
        from torch.distributed import all_reduce

        all_reduce(tensor)

    def complete_(self, parts: Sequence[Tensor]) -> None:
        from torch.distributed import broadcast

        for index, part in enumerate(parts):
            broadcast(part, src=index % self.size)

    def mean_gradients_(self, parameters: Iterable[Tensor], weight: Tensor | float) -> None:
        parameters = list(parameters)
        own = torch.as_tensor(weight, dtype=torch.float32, device=parameters[0].device)
        total = own.clone()
        self.sum_(total)
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad.mul_(own / total)
            self.sum_(parameter.grad)

    def wait(self) -> None:
        from torch.distributed import barrier

        barrier(self.patient)

    def _tell(self, outcome: tuple[Any, Exception | None] | None, owner: int) -> Any:
        """Returns the value of the process that has an outcome, in every process, or raises its error."""
        from torch.distributed import broadcast_object_list

        value, error = outcome or (None, None)
        box = [value, None if error is None else str(error)]
        broadcast_object_list(box, src=owner, group=self.patient, device=torch.device("cpu"))
        if error is not None:
            raise error
        if box[1] is not None:
            raise FailedElsewhere(box[1])
        return value if self.rank == owner else box[0]


def _outcome(compute: Callable[..., Value], *arguments: Any) -> tuple[Value | None, Exception | None]:
    """Returns the value and None, or None and the error that a user can mend; after others the process ends."""
    try:
        return compute(*arguments), None
    except (ValueError, OSError) as error:
        return None, error

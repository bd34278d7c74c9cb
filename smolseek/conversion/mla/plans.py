"""Plans of rope slots: which frequencies of the source the rotated key keeps. No torch: `plan` reads them, too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_DENSE_SLOTS = 16
"""So many slots are as good as one for each frequency: folded neighbours turn nearly alike."""


@dataclass(frozen=True)
class RopePlan:
    """Which source frequencies each slot folds together; slot j turns like source frequency stride * j, its first."""

    stride: int
    folds: tuple[tuple[int, ...], ...]

    def rope_theta(self, source_theta: float, head_dim: int) -> float:
        """Returns the target's rope_theta, under which slot j turns exactly like source frequency stride * j."""
        return source_theta ** (self.stride * 2 * len(self.folds) / head_dim)

    def angles(self, slots: Sequence[float], own: Sequence[float]) -> list[float]:
        """Returns the angle at which each source frequency turns: its slot's, or its own beyond the slots."""
        return [slots[i // self.stride] if i // self.stride < len(slots) else angle for i, angle in enumerate(own)]

    def emptied(self) -> RopePlan:
        """Returns the same slots with nothing in them, for a layer that does not rotate."""
        return RopePlan(self.stride, ((),) * len(self.folds))


def rope_plans(head_dim: int, rope_dim: int) -> list[RopePlan]:
    """Returns the ways to place rope_dim / 2 slots on the source's head_dim / 2 frequencies, fastest first.

    With stride n slot j takes frequency n * j, alone or folded with its n - 1 slower neighbours. A frequency that no
    slot takes stays unrotated. Slots beyond the source's frequencies stay empty. Many slots have all frequencies folded
    into them and no other plan: neighbours are near to each other then, and each stride takes a pass (LOG.md).
    """
    if rope_dim > head_dim:
        extra = ((),) * ((rope_dim - head_dim) // 2)
        return [RopePlan(1, tuple((i,) for i in range(head_dim // 2)) + extra)]
    slots, widest = rope_dim // 2, head_dim // rope_dim
    dense = slots >= _DENSE_SLOTS
    plans = []
    for stride in [n for n in (1, 2, 4, 8, 16) if n < widest and not dense] + [widest]:
        for width in sorted({stride if dense else 1, stride}):
            folds = tuple(tuple(range(stride * j, stride * j + width)) for j in range(slots))
            plans.append(RopePlan(stride, folds))
    return plans

"""Means with standard errors, and differences between two measurements."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Estimate(NamedTuple):
    """A mean and its standard error; the error is None where it is unknown."""

    mean: float
    error: float | None

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + ("" if self.error is None else f" ± {self.error:.4f}")


def estimate(values: Sequence[float]) -> Estimate:
    """Returns the mean and its standard error, s / sqrt(n), which is unknown for a single value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Estimate(statistics.fmean(values), error)


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """Returns ours - theirs for measurements of the same items in the same order.

    The standard error is that of the items' differences: what makes an item hard for both cancels.
    """
    return estimate([a - b for a, b in zip(ours, theirs, strict=True)])


def unpaired_difference(ours: Estimate, theirs: Estimate) -> Estimate:
    """Returns ours - theirs where items cannot be matched: the errors are combined as independent ones."""
    known = ours.error is not None and theirs.error is not None
    error = math.hypot(ours.error or 0.0, theirs.error or 0.0) if known else None
    return Estimate(ours.mean - theirs.mean, error)

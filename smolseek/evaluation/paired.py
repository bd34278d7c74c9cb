"""Means with their standard errors, and differences of two measurements of the same things."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Estimate(NamedTuple):
    """A mean and its standard error, which is None where there is no telling."""

    mean: float
    error: float | None

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + ("" if self.error is None else f" ± {self.error:.4f}")


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error of the mean, s / sqrt(n)."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Estimate(statistics.fmean(values), error)


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """ours - theirs, item by item: what both find hard alike cancels, so the error is that of the differences."""
    return estimate([a - b for a, b in zip(ours, theirs, strict=True)])


def unpaired_difference(ours: Estimate, theirs: Estimate) -> Estimate:
    """ours - theirs where items cannot be matched: the errors add up as if independent."""
    known = ours.error is not None and theirs.error is not None
    error = math.hypot(ours.error or 0.0, theirs.error or 0.0) if known else None
    return Estimate(ours.mean - theirs.mean, error)

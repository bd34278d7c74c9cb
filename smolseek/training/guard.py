"""Which steps may touch the weights: one with a loss or gradient that is not finite, or a spike, may not."""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any

from smolseek.config import TrainSettings

RECENT_STEPS = 50
"""Accepted losses that the median is taken over."""
FEWEST_STEPS = 10
"""Accepted losses before a spike can be told from a start."""


class StepGuard:
    """Judges each step by its loss and gradient norm, and counts those that were skipped, in all and in a row."""

    def __init__(self, settings: TrainSettings) -> None:
        self.spike_factor = settings.spike_factor
        self.recent: deque[float] = deque(maxlen=RECENT_STEPS)
        self.skipped, self.in_a_row = 0, 0

    def objection(self, loss: float, gradient_norm: float) -> str | None:
        """Why this step must be skipped, in a few words, or None; either way the step is counted."""
        reason = self._reason(loss, gradient_norm)
        if reason is None:
            self.recent.append(loss)
            self.in_a_row = 0
        else:
            self.skipped += 1
            self.in_a_row += 1
        return reason

    def _reason(self, loss: float, gradient_norm: float) -> str | None:
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(gradient_norm):
            return f"the loss is {loss:.4f} and the gradient norm {gradient_norm}"
        if self.spike_factor and len(self.recent) >= FEWEST_STEPS:
            median = statistics.median(self.recent)
            if loss > self.spike_factor * median:
                return f"the loss is {loss:.4f}, {loss / median:.1f} times the median of recent steps"
        return None

    def state(self) -> dict[str, Any]:
        """JSON-able; for `restore`."""
        return {"recent": list(self.recent), "skipped": self.skipped, "in_a_row": self.in_a_row}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.recent = deque(state["recent"], maxlen=RECENT_STEPS)
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]

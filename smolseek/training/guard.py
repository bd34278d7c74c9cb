"""Decides which steps may change the weights: none with a spike, or with a loss or gradient that is not finite."""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any

from smolseek.config import TrainSettings

RECENT_STEPS = 50
"""The median is taken over this many accepted losses."""
FEWEST_STEPS = 10
"""With fewer accepted losses no step counts as a spike: at the start, losses still change fast."""


class StepGuard:
    """Judges each step by its loss and gradient norm, and counts those that were skipped, in all and in a row."""

    def __init__(self, settings: TrainSettings) -> None:
        self.spike_factor = settings.spike_factor
        self.recent: deque[float] = deque(maxlen=RECENT_STEPS)
        self.skipped, self.in_a_row = 0, 0

    def objection(self, loss: float, gradient_norm: float) -> str | None:
        """Returns why this step must be skipped, in a few words, or None. The step is counted either way.

        A loss of 0 is that of a batch without any token to learn, and says nothing of others.
        """
        reason = self._reason(loss, gradient_norm)
        if reason is None:
            self.recent.extend([loss] if loss else [])
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
        """Returns what `restore` needs, JSON-able."""
        return {"recent": list(self.recent), "skipped": self.skipped, "in_a_row": self.in_a_row}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.recent = deque(state["recent"], maxlen=RECENT_STEPS)
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]

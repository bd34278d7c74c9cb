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
RECURRING = 3
"""So many high losses in the last `RECURRING_STEPS` steps, apart from one another, are those of harder text."""
RECURRING_STEPS = 1000


class StepGuard:
    """Judges each step by its loss and gradient norm, and counts those that were skipped, in all and in a row.

    A loss is high when it is above `spike_factor` times the median of recent ones. It is a spike unless it recurs: the
    batches of a harder source have high losses, are too few to move the median, and must be learnt all the same.
    """

    def __init__(self, settings: TrainSettings) -> None:
        self.spike_factor = settings.spike_factor
        self.recent: deque[float] = deque(maxlen=RECENT_STEPS)
        self.high: list[tuple[int, float]] = []
        """The last high losses with the numbers of their steps; of several in a row only the first."""
        self.judged, self.last_high = 0, -1
        self.skipped, self.in_a_row = 0, 0

    def objection(self, loss: float, gradient_norm: float) -> str | None:
        """Returns why this step must be skipped, in a few words, or None. The step is counted either way.

        A loss of 0 is that of a batch without any token to learn, and says nothing of others.
        """
        reason = self._reason(loss, gradient_norm)
        self.judged += 1
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
            if loss > self.spike_factor * median and not self._recurs(loss):
                return f"the loss is {loss:.4f}, {loss / median:.1f} times the median of recent steps"
        return None

    def _recurs(self, loss: float) -> bool:
        """Returns whether enough earlier losses were about as high as this high one, and notes it.

        About as high is at least 1 / `spike_factor` of it. High losses in a row count once, because bad weights give
        nothing else, whatever the text.
        """
        self.high = [(step, high) for step, high in self.high if self.judged - step < RECURRING_STEPS]
        recurs = sum(loss <= self.spike_factor * high for _, high in self.high) >= RECURRING
        if self.judged > self.last_high + 1:
            self.high.append((self.judged, loss))
        self.last_high = self.judged
        return recurs

    def state(self) -> dict[str, Any]:
        """Returns what `restore` needs, JSON-able."""
        counts = {name: getattr(self, name) for name in ("judged", "last_high", "skipped", "in_a_row")}
        return {"recent": list(self.recent), "high": self.high} | counts

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken; an older version's knows no high losses."""
        self.recent = deque(state["recent"], maxlen=RECENT_STEPS)
        self.high = [(step, loss) for step, loss in state.get("high", ())]
        self.judged, self.last_high = state.get("judged", 0), state.get("last_high", -1)
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]

"""How a learning rate changes over the steps of a run."""

from __future__ import annotations

import math
from typing import Literal

import torch


def decayed(
    step: int,
    steps: int,
    *,
    warmup_steps: int,
    final_share: float = 0.0,
    shape: Literal["cosine", "wsd"] = "cosine",
    decay_share: float = 0.2,
) -> float:
    """Returns the share of the peak rate at a step: 1 until the warm-up ends, `final_share` after all `steps`.

    A cosine leads from one to the other. `wsd` (warm-up, stable, decay; Hu et al. 2024, section 4) stays at 1 and goes
    down in a straight line over the last `decay_share` of the steps.
    """
    if shape == "wsd":
        span = max(1, round(decay_share * steps))
        height = min(1.0, max(0, steps - step) / span)
    else:
        span = max(1, steps - warmup_steps)
        height = 0.5 * (1 + math.cos(math.pi * min(1.0, max(0, step - warmup_steps) / span)))
    return final_share + (1 - final_share) * height


def warmed_cosine(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Returns a schedule for rates already in the groups: warm-up over a twentieth of the steps, a cosine to zero."""
    warmup_steps = max(1, steps // 20)

    def factor(step: int) -> float:
        return (step + 1) / warmup_steps if step < warmup_steps else decayed(step, steps, warmup_steps=warmup_steps)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

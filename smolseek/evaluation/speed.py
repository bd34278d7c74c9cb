"""Decoding speed."""

from __future__ import annotations

import statistics
import time

from torch import Tensor

from smolseek.generation import stream
from smolseek.model import DeepseekV3, StockModel


def measure_decode_speed(
    model: DeepseekV3 | StockModel, ids_T: Tensor, *, new_tokens: int = 64, runs: int = 3
) -> float:
    """Returns tokens per second of greedy decoding after the prompt `ids_T` (T,), without prefill: the median run."""
    room = model.config.max_position_embeddings - len(ids_T)
    speeds = []
    for _ in range(runs):
        tokens = stream(
            model, ids_T[None].to(next(model.parameters()).device), max_new_tokens=min(new_tokens + 1, room)
        )
        next(tokens)  # the prefill and the first token
        start = time.perf_counter()
        count = sum(1 for _ in tokens)
        speeds.append(count / (time.perf_counter() - start))
    return statistics.median(speeds)

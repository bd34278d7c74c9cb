"""One token of every sequence at a time, in steps of fixed shapes: on a GPU each step is one launch, a CUDA graph.

Launching the kernels of a step one by one takes a CPU longer than a GPU takes to compute them.

Shapes: B sequences, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeGuard

import torch
from torch import Tensor, nn

from smolseek.model.balance import expert_layers
from smolseek.model.cache import FixedCache, LatentCache
from smolseek.model.experts import counts_kept
from smolseek.model.transformer import DeepseekV3
from smolseek.numerics.shards import gathers_weights

_FEWEST_COLUMNS = 256
ROPES_BY_LENGTH = ("dynamic", "longrope")
"""Rope types that rotate by other angles where the sequence is longer."""


class DecodeStep:
    """Decodes a token of every sequence through a cache that holds at least one.

    The step reads a number of columns that grows with the cache in few sizes, and masks those that are not filled. On
    CUDA it is captured once for each size. With another device it runs as it is.
    """

    def __init__(self, model: DeepseekV3, cache: LatentCache) -> None:
        self.model, self.cache = model, cache
        batch, device = cache.entries_LBSW.shape[1], cache.entries_LBSW.device
        self.ids_B1 = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.columns = 0
        self.run: Callable[[], None] = self._forward

    @torch.inference_mode()
    def __call__(self, ids_B1: Tensor) -> Tensor:
        """Returns the logits behind the given tokens, (B, V); the next step overwrites them.

        Raises:
            ValueError: the cache is full.
        """
        self.cache.reserve(1)
        columns = columns_for(self.cache.length + 1, self.cache.capacity_tokens)
        self.ids_B1.copy_(ids_B1)
        if columns != self.columns:
            self.columns, self.fixed = columns, FixedCache(self.cache, columns)
            self.run = self._captured() if self.ids_B1.device.type == "cuda" else self._forward
        self.run()
        self.cache.advance(1)
        return self.logits_BV

    def _forward(self) -> None:
        hidden_BTD = self.model.hidden_states(self.ids_B1, cache=self.fixed)
        self.logits_BV = self.model.lm_head(hidden_BTD[:, -1])

    def _captured(self) -> Callable[[], None]:
        """Returns what runs the step as a CUDA graph."""
        warm_up = torch.cuda.Stream()
        warm_up.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm_up), counts_kept(self.model):
            self._forward()  # libraries choose kernels and allocate in their first call, which no graph may hold
        torch.cuda.current_stream().wait_stream(warm_up)
        self.fixed.length_1.fill_(self.cache.length)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._forward()
        return graph.replay


def columns_for(tokens: int, capacity: int) -> int:
    """Returns how many columns a step reads: those it needs and at most 255, or a quarter, more; so sizes are few."""
    unit = max(_FEWEST_COLUMNS, 1 << max(0, tokens.bit_length() - 3))
    return min(capacity, -(-tokens // unit) * unit)


def has_fixed_steps(model: nn.Module) -> TypeGuard[DeepseekV3]:
    """Returns whether a `DecodeStep` of this model is a CUDA graph: the CPU reads no number of the GPU on the way.

    It would for a rope that depends on the length, and for experts that are not in bf16 or whose GPU has no grouped
    product (Hopper and Blackwell have one; the substitute reads the experts' sizes). A model that several processes
    divide gathers its weights between kernels, which no graph may hold.
    """
    if not isinstance(model, DeepseekV3) or model.lm_head.weight.device.type != "cuda" or gathers_weights(model):
        return False
    weight, rope = model.model.embed_tokens.weight, model.model.rotary_emb.rope_type
    grouped = weight.dtype == torch.bfloat16 and torch.cuda.get_device_capability(weight.device)[0] in (9, 10)
    return rope not in ROPES_BY_LENGTH and (grouped or not expert_layers(model))

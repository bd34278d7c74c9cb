"""An adapter that gives any transformers causal LM the interface of our own model.

Shapes: B sequences, T new tokens in each, S tokens attended to (cached and new), D hidden_size, V vocab_size; input_ids
and segment_ids are (B, T).
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn


class StockCache:
    """transformers' key-value cache, and how many left-padding tokens each of its rows has."""

    def __init__(self, config: Any, padding_B: Tensor | None) -> None:
        from transformers import DynamicCache

        self.inner = DynamicCache(config=config)
        self.padding_B = padding_B

    @property
    def length(self) -> int:
        """Tokens held in each row, padding included."""
        return self.inner.get_seq_length()


class StockModel(nn.Module):
    """A transformers causal LM with the `hidden_states`, `forward`, `new_cache` and `lm_head` of `DeepseekV3`."""

    end_token_ids: tuple[int, ...] = ()
    """The tokens that end a text, by config.json and generation_config.json of the folder that was loaded."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.config = model.config
        self._cache_argument = cache_argument(model.base_model)

    @property
    def lm_head(self) -> nn.Linear:
        """The output projection."""
        return self.model.get_output_embeddings()

    def new_cache(self, batch_size: int, capacity_tokens: int, padding_B: Tensor | None = None) -> StockCache:
        """Returns an empty cache, which grows as needed: `capacity_tokens` is ignored."""
        return StockCache(self.config, padding_B)

    def hidden_states(
        self, input_ids: Tensor, *, segment_ids: Tensor | None = None, cache: StockCache | None = None
    ) -> Tensor:
        """Returns the hidden states after the final norm, (B, T, D); arguments as in `DeepseekV3.hidden_states`."""
        inputs: dict[str, Any] = {"input_ids": input_ids}
        if segment_ids is not None:
            inputs["attention_mask"] = _packed_mask(segment_ids, self.lm_head.weight.dtype)
        if cache is not None:
            inputs |= {self._cache_argument: cache.inner, "use_cache": True}
            if cache.padding_B is not None:
                columns_S = torch.arange(cache.length + input_ids.shape[1], device=input_ids.device)
                seen_BS = columns_S >= cache.padding_B[:, None]
                inputs["attention_mask"] = seen_BS.long()
                positions_BS = (columns_S - cache.padding_B[:, None]).clamp(min=0)
                inputs["position_ids"] = positions_BS[:, -input_ids.shape[1] :]
        else:
            inputs["use_cache"] = False
        return self.model.base_model(**inputs).last_hidden_state

    def forward(
        self, input_ids: Tensor, *, segment_ids: Tensor | None = None, cache: StockCache | None = None
    ) -> Tensor:
        """Returns logits, (B, T, V); arguments as in `DeepseekV3.hidden_states`."""
        return self.lm_head(self.hidden_states(input_ids, segment_ids=segment_ids, cache=cache))


def cache_argument(model: nn.Module) -> str:
    """Returns what the forward pass of a transformers model calls its cache: `cache` since 5.24 at the latest."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _packed_mask(segment_ids_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns an additive mask (B, 1, T, T): causal, and between two documents the dtype's lowest number."""
    tokens = segment_ids_BT.shape[1]
    causal_TT = torch.ones(tokens, tokens, dtype=torch.bool, device=segment_ids_BT.device).tril()
    same_BTT = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    mask = torch.zeros(same_BTT.shape, dtype=dtype, device=segment_ids_BT.device)
    return mask.masked_fill(~(causal_TT & same_BTT), torch.finfo(dtype).min)[:, None]

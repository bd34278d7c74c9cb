"""The latent cache: it keeps one normalised latent and one rotated key per token and layer.

A `FixedCache` is the same memory with shapes that no step changes.

Shapes: L num_hidden_layers, B sequences, T new tokens in each, S tokens attended to (cached and new; the cache's
capacity in its own tensor), C kv_lora_rank, R qk_rope_head_dim, W = C + R, a cache entry.
"""

import torch
from torch import Tensor
from transformers import DeepseekV3Config


class LatentCache:
    """Preallocated cache for inference of c_KV and k_R (DeepSeek-V2, section 2.1), the only state MLA needs.

    `padding_B` counts the left-padding tokens of each row; `length` counts the columns filled so far, padding included.
    As in transformers, a key is rotated once and never again. So a longrope model whose short and long factors differ
    gives other numbers when it decodes past `original_max_position_embeddings` than in one full forward.
    """

    def __init__(
        self,
        config: DeepseekV3Config,
        batch_size: int,
        capacity_tokens: int,
        padding_B: Tensor | None = None,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.kv_lora_rank = config.kv_lora_rank
        width = config.kv_lora_rank + config.qk_rope_head_dim
        shape = (config.num_hidden_layers, batch_size, capacity_tokens, width)
        # Latent and key lie side by side: absorbed attention uses both as its key, and the latent alone as its value.
        self.entries_LBSW = torch.zeros(shape, dtype=dtype, device=device)
        self.padding_B = None if padding_B is None else padding_B.to(device)
        self.length = 0

    @property
    def nbytes(self) -> int:
        """Allocated bytes: layers * batch * capacity * (kv_lora_rank + qk_rope_head_dim) * itemsize."""
        return self.entries_LBSW.nbytes

    @property
    def capacity_tokens(self) -> int:
        return self.entries_LBSW.shape[2]

    @property
    def is_empty(self) -> bool:
        return self.length == 0

    def new_columns(self, tokens: int) -> Tensor:
        """Returns the columns that the next tokens will fill, (T,)."""
        return torch.arange(self.length, self.length + tokens, device=self.entries_LBSW.device)

    def mask(self, tokens: int) -> Tensor | None:
        """Returns which columns each of the next tokens may attend to, (B or 1, 1, T, S); None if it sees all."""
        if self.padding_B is None and (self.is_empty or tokens == 1):
            return None
        columns_S = torch.arange(self.length + tokens, device=self.entries_LBSW.device)
        return _visible(columns_S, columns_S[self.length :], self.padding_B)

    def reserve(self, new_tokens: int) -> None:
        """Checks that `new_tokens` more tokens fit; raises ValueError if they do not."""
        if self.length + new_tokens > self.capacity_tokens:
            raise ValueError(
                f"{self.length} tokens held + {new_tokens} new exceed the cache's capacity of {self.capacity_tokens}: "
                "ask new_cache for a larger capacity_tokens"
            )

    def write(self, layer_index: int, latent_BTC: Tensor, rope_key_BTR: Tensor) -> Tensor:
        """Stores one layer's new tokens behind the first `length` and returns the layer's entries, (B, S, W).

        S = length + T. The model advances `length` when all layers have written.
        """
        end = self.length + latent_BTC.shape[1]
        entries_BSW = self.entries_LBSW[layer_index, :, :end]
        entries_BSW[:, self.length :, : self.kv_lora_rank] = latent_BTC
        entries_BSW[:, self.length :, self.kv_lora_rank :] = rope_key_BTR
        return entries_BSW

    def advance(self, tokens: int) -> None:
        """Counts tokens that all layers have written."""
        self.length += tokens


class FixedCache:
    """The first columns of a cache, for steps of one token that all have the same shapes, as a CUDA graph wants them.

    The number of tokens held is a tensor, `length_1`, and columns behind it are masked.
    """

    is_empty = False

    def __init__(self, cache: LatentCache, columns: int) -> None:
        self.kv_lora_rank, self.padding_B = cache.kv_lora_rank, cache.padding_B
        self.entries_LBSW = cache.entries_LBSW[:, :, :columns]
        self.columns_S = torch.arange(columns, device=cache.entries_LBSW.device)
        self.length_1 = torch.full((1,), cache.length, device=cache.entries_LBSW.device)

    def reserve(self, new_tokens: int) -> None:
        """Does nothing: who makes the steps knows that they fit."""

    def new_columns(self, tokens: int) -> Tensor:
        """Returns what `LatentCache.new_columns` returns, for one token."""
        assert tokens == 1
        return self.length_1

    def mask(self, tokens: int) -> Tensor:
        """Returns what `LatentCache.mask` returns; always a mask."""
        return _visible(self.columns_S, self.length_1, self.padding_B)

    def write(self, layer_index: int, latent_BTC: Tensor, rope_key_BTR: Tensor) -> Tensor:
        """Stores one layer's new token and returns the layer's entries, (B, S, W), all columns."""
        entries_BSW = self.entries_LBSW[layer_index]
        new_BTW = torch.cat((latent_BTC, rope_key_BTR), dim=-1).to(entries_BSW.dtype)
        return entries_BSW.index_copy_(1, self.length_1, new_BTW)

    def advance(self, tokens: int) -> None:
        """Counts the token that all layers have written."""
        self.length_1 += tokens


def _visible(columns_S: Tensor, new_T: Tensor, padding_B: Tensor | None) -> Tensor:
    """Returns which columns the tokens in the columns `new_T` may attend to, (B or 1, 1, T, S)."""
    rows_T1 = new_T[:, None]
    mask_B1TS = (columns_S <= rows_T1)[None, None]
    if padding_B is not None:
        # A padding token sees itself, because a row that sees nothing gives NaN in some kernels.
        mask_B1TS = mask_B1TS & (columns_S >= padding_B[:, None, None, None]) | (columns_S == rows_T1)
    return mask_B1TS

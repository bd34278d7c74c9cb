"""The latent cache: it keeps one normalised latent and one rotated key per token and layer.

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

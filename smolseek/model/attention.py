"""Multi-head latent attention (DeepSeek-V2, section 2.1; DeepSeek-V3, section 2.1.1), expanded and absorbed.

Shapes: B sequences, T new tokens in each, S tokens attended to (cached and new), N = B × T tokens; D hidden_size,
H num_attention_heads, U qk_nope_head_dim, R qk_rope_head_dim, s = R / 2 rope slots, Q = U + R, v v_head_dim,
C kv_lora_rank, W = C + R, a cache entry; P parts of the cache, O outputs and A inputs of a linear map.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import yarn_apply_mscale

from smolseek.model.cache import FixedCache, LatentCache
from smolseek.model.layers import RMSNorm
from smolseek.model.packed import attend_blocks

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

_SPLIT_TOKENS = 1024
"""A CPU reads the cache of one sequence in parts when it holds at least this many tokens."""
LATENT_NORM_EPS = 1e-6  # transformers hard-codes it in both latent norms, whatever rms_norm_eps says


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Returns `x`, (..., n), with its n / 2 pairs rotated (RoPE: Su et al. 2021, section 3.2), in the dtype of `x`.

    `cos` and `sin` are (..., n / 2) and broadcast against `x`. Pair i holds the entries i and i + n / 2 (Llama's
    layout), or 2i and 2i + 1 when `interleaved`. The result is in Llama's layout in both cases: queries and keys share
    the order, so scores do not depend on it.
    """
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat(rotated, dim=-1).to(x.dtype)


class MultiheadLatentAttention(nn.Module):
    """Causal MLA; queries have a low-rank form too unless `q_lora_rank` is null."""

    def __init__(self, config: DeepseekV3Config, layer_index: int) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.num_heads, self.q_lora_rank = config.num_attention_heads, config.q_lora_rank
        self.nope_dim, self.rope_dim = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.v_head_dim, self.kv_lora_rank = config.v_head_dim, config.kv_lora_rank
        self.rope_interleave = config.rope_interleave
        self.attention_dropout = config.attention_dropout
        qk_head_dim = self.nope_dim + self.rope_dim
        self.scaling = yarn_apply_mscale(config.rope_parameters, qk_head_dim**-0.5)

        hidden, bias = config.hidden_size, config.attention_bias
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, self.num_heads * qk_head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, eps=LATENT_NORM_EPS)
            self.q_b_proj = nn.Linear(config.q_lora_rank, self.num_heads * qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, self.kv_lora_rank + self.rope_dim, bias=bias)
        self.kv_a_layernorm = RMSNorm(self.kv_lora_rank, eps=LATENT_NORM_EPS)
        self.kv_b_proj = nn.Linear(self.kv_lora_rank, self.num_heads * (self.nope_dim + self.v_head_dim), bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.v_head_dim, hidden, bias=bias)
        self.fused_a_proj: nn.Module | None = None
        """Computes query and latent in one product; set by `inference.prepare_for_generation` and None before."""
        self.absorbed: tuple[Tensor, Tensor] | None = None
        """Copies of `up_projections()` for decoding; set by `inference.prepare_for_generation` and None before."""

    def forward(
        self,
        x_BTD: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | BlockMask | None = None,
        cache: LatentCache | FixedCache | None = None,
    ) -> Tensor:
        """Returns the attention output, (B, T, D).

        `rope` holds cos and sin, (B or 1, T, 1, s). The mask is (B or 1, 1, T, S), or has the blocks of
        `packed.document_blocks`. Without a mask attention is causal over the given tokens; if the cache holds a prefix,
        only one token may be given without a mask, and it sees the whole prefix.
        """
        q_nope_BTHU, q_rope_BTHR, latent_BTC, k_rope_BTR = self._project(x_BTD, rope)
        entries_BSW = None if cache is None else cache.write(self.layer_index, latent_BTC, k_rope_BTR)
        if cache is None or entries_BSW is None or cache.is_empty:
            out_BTHv = self._attend_expanded(q_nope_BTHU, q_rope_BTHR, latent_BTC, k_rope_BTR, mask)
        else:
            assert mask is None or isinstance(mask, Tensor), "packed windows have no cache"
            out_BTHv = self._attend_absorbed(q_nope_BTHU, q_rope_BTHR, entries_BSW, mask)
        return self.o_proj(out_BTHv.flatten(2))

    def _project(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns the unrotated queries (B, T, H, U), the rotated queries (B, T, H, R), and what the cache keeps of
        each token: the normalised latent (B, T, C) and the rotated key that all heads share (B, T, R)."""
        if self.fused_a_proj is not None:
            q, kv_BTW = self.fused_a_proj(x_BTD).tensor_split([-self.kv_lora_rank - self.rope_dim], dim=-1)
        else:
            q = (self.q_proj if self.q_lora_rank is None else self.q_a_proj)(x_BTD)
            kv_BTW = self.kv_a_proj_with_mqa(x_BTD)
        if self.q_lora_rank is not None:
            q = self.q_b_proj(self.q_a_layernorm(q))
        q_nope, q_rope = q.unflatten(-1, (self.num_heads, -1)).split([self.nope_dim, self.rope_dim], dim=-1)
        latent_BTC, k_rope_BTR = kv_BTW.split([self.kv_lora_rank, self.rope_dim], dim=-1)
        both = rotate(torch.cat((q_rope, k_rope_BTR.unsqueeze(2)), dim=2), *rope, self.rope_interleave)
        return q_nope, both[:, :, :-1], self.kv_a_layernorm(latent_BTC), both[:, :, -1]

    def _attend_expanded(
        self,
        q_nope_BTHU: Tensor,
        q_rope_BTHR: Tensor,
        latent_BTC: Tensor,
        k_rope_BTR: Tensor,
        mask: Tensor | BlockMask | None,
    ) -> Tensor:
        """Returns attention within a window, (B, T, H, v); keys and values of every head are expanded from latents."""
        kv = self.kv_b_proj(latent_BTC).unflatten(-1, (self.num_heads, -1))
        k_nope_BTHU, v_BTHv = kv.split([self.nope_dim, self.v_head_dim], dim=-1)
        k_rope_BTHR = k_rope_BTR.unsqueeze(2).expand_as(q_rope_BTHR)
        q_BTHQ = torch.cat((q_nope_BTHU, q_rope_BTHR), dim=-1)
        k_BTHQ = torch.cat((k_nope_BTHU, k_rope_BTHR), dim=-1)
        if mask is not None and not isinstance(mask, Tensor):
            q_BHTQ, k_BHTQ, v_BHTv = (x.transpose(1, 2) for x in (q_BTHQ, k_BTHQ, v_BTHv))
            return attend_blocks(q_BHTQ, k_BHTQ, v_BHTv, mask, self.scaling).transpose(1, 2)
        # The fused CPU and CUDA kernels need equal head sizes; adding zero columns is cheaper than the unfused kernel.
        v_BTHQ = F.pad(v_BTHv, (0, max(0, q_BTHQ.shape[-1] - self.v_head_dim)))
        out_BHTQ = F.scaled_dot_product_attention(
            q_BTHQ.transpose(1, 2),
            k_BTHQ.transpose(1, 2),
            v_BTHQ.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            dropout_p=self.attention_dropout if self.training else 0.0,
            scale=self.scaling,
        )
        return out_BHTQ[..., : self.v_head_dim].transpose(1, 2)

    def _attend_absorbed(
        self, q_nope_BTHU: Tensor, q_rope_BTHR: Tensor, entries_BSW: Tensor, mask_B1TS: Tensor | None
    ) -> Tensor:
        """Returns attention to the cache entries, (B, T, H, v), with W_UK absorbed into the query and W_UV into the
        output.

        q (W_UK c) = (q W_UK) c (DeepSeek-V2, section 2.1.2), so all heads share one key, the cache entry, and one
        value, its latent. The fused kernels need key and value of one width, so the value keeps the key's R columns
        and the result drops them.
        """
        up_k_HUC, up_v_HCv = self.absorbed or self.up_projections()
        q_latent_BTHC = _per_head(q_nope_BTHU, up_k_HUC)
        q_BTHW = torch.cat((q_latent_BTHC, q_rope_BTHR), dim=-1)
        entries_BSW = entries_BSW.to(q_BTHW.dtype)
        if q_BTHW.shape[1] == 1:
            out_BTHW = _attend_one_token(q_BTHW, entries_BSW.unsqueeze(1), mask_B1TS, self.scaling)
        else:
            entries_B1SW = entries_BSW.unsqueeze(1)
            out_BTHW = F.scaled_dot_product_attention(
                q_BTHW.transpose(1, 2),
                entries_B1SW,
                entries_B1SW,
                attn_mask=mask_B1TS,
                scale=self.scaling,
                enable_gqa=True,
            ).transpose(1, 2)
        return _per_head(out_BTHW[..., : self.kv_lora_rank], up_v_HCv)

    def up_projections(self) -> tuple[Tensor, Tensor]:
        """Returns W_UK (H, U, C) and the transpose of W_UV (H, C, v) as views of `kv_b_proj`."""
        up_HOC = self.kv_b_proj.weight.unflatten(0, (self.num_heads, -1))
        up_k_HUC, up_v_HvC = up_HOC.split([self.nope_dim, self.v_head_dim], dim=1)
        return up_k_HUC, up_v_HvC.transpose(1, 2)


def _per_head(x_BTHA: Tensor, weight_HAO: Tensor) -> Tensor:
    """Returns each head's vectors times that head's matrix, (B, T, H, O).

    The product is computed in the dtype of the matrices and returned in the dtype of `x_BTHA`.
    """
    x_HNA = x_BTHA.flatten(0, 1).transpose(0, 1).to(weight_HAO.dtype)
    return torch.bmm(x_HNA, weight_HAO).transpose(0, 1).unflatten(0, x_BTHA.shape[:2]).to(x_BTHA.dtype)


def _attend_one_token(q_B1HW: Tensor, entries_B1SW: Tensor, mask_B1TS: Tensor | None, scaling: float) -> Tensor:
    """Returns the attention of one new token per sequence, (B, 1, H, W).

    All heads share their keys, so they are passed to the kernel as the rows of a single head: this is twice as fast as
    broadcasting the keys to the heads. The CPU kernel uses one thread per sequence, so a long cache of a single
    sequence is read in parts, one per thread, and the parts are merged by their log-sum-exp (flash-decoding).
    """
    threads = torch.get_num_threads()
    batch, _, tokens, _ = entries_B1SW.shape
    if batch > 1 or mask_B1TS is not None or q_B1HW.device.type != "cpu" or threads == 1 or tokens < _SPLIT_TOKENS:
        return F.scaled_dot_product_attention(q_B1HW, entries_B1SW, entries_B1SW, attn_mask=mask_B1TS, scale=scaling)
    size = tokens // threads
    whole_BPSW = entries_B1SW[:, :, : size * threads].unflatten(2, (threads, size)).squeeze(1)
    parts = [_with_log_sum_exp(q_B1HW.expand(-1, threads, -1, -1), whole_BPSW, scaling)]
    if size * threads < tokens:
        parts.append(_with_log_sum_exp(q_B1HW, entries_B1SW[:, :, size * threads :], scaling))
    out_BPHW, logsumexp_BPH = (torch.cat(both, dim=1) for both in zip(*parts, strict=True))
    share_BPH1 = logsumexp_BPH.softmax(dim=1).unsqueeze(-1).to(out_BPHW.dtype)
    return (out_BPHW * share_BPH1).sum(dim=1, keepdim=True)


def _with_log_sum_exp(q_BPHW: Tensor, entries_BPSW: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Returns the attention to each part, (B, P, H, W), and the log-sum-exp of its scores, (B, P, H)."""
    out = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q_BPHW, entries_BPSW, entries_BPSW, scale=scaling)
    return out[0], out[1]

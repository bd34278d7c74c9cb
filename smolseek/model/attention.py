"""Multi-head latent attention (DeepSeek-V2, section 2.1; DeepSeek-V3, section 2.1.1), expanded and absorbed.

Shapes: B batch, T new tokens, S tokens attended to (prefix + new), D hidden, H heads, N qk_nope_head_dim,
R qk_rope_head_dim, Q = N + R, V v_head_dim, C kv_lora_rank, W = C + R (a cache entry).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import yarn_apply_mscale

from smolseek.model.cache import LatentCache
from smolseek.model.layers import RMSNorm

_SPLIT_TOKENS = 1024
"""From how many cached tokens on the CPU reads one sequence's cache in parts."""
LATENT_NORM_EPS = 1e-6  # transformers hard-codes it in both latent norms, whatever rms_norm_eps says


def rotate(x_BTHR: Tensor, cos_BT1P: Tensor, sin_BT1P: Tensor, interleaved: bool) -> Tensor:
    """RoPE over P = R / 2 pairs, (2i, 2i + 1) when interleaved, else (i, i + P); the result is in the second
    order, which no score can see because queries and keys share it."""
    first, second = (x_BTHR[..., 0::2], x_BTHR[..., 1::2]) if interleaved else x_BTHR.chunk(2, dim=-1)
    rotated = (first * cos_BT1P - second * sin_BT1P, second * cos_BT1P + first * sin_BT1P)
    return torch.cat(rotated, dim=-1).to(x_BTHR.dtype)


class MultiheadLatentAttention(nn.Module):
    """Causal MLA with an optional query rank (`q_lora_rank: null` for none)."""

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
        """What `inference.prepare_for_generation` puts in place of both projections of the hidden state."""
        self.absorbed: tuple[Tensor, Tensor] | None = None
        """W_UK and W_UV as it laid them out, else taken from `kv_b_proj`."""

    def forward(
        self,
        x_BTD: Tensor,
        rope: tuple[Tensor, Tensor],
        mask_B1TS: Tensor | None = None,
        cache: LatentCache | None = None,
    ) -> Tensor:
        """Attention output (B, T, D).

        `rope` holds cos and sin, (B or 1, T, 1, R / 2). Without a mask: causal over the tokens given, or, when the
        cache holds a prefix, one token that sees all of it.
        """
        q_nope_BTHN, q_rope_BTHR, latent_BTC, k_rope_BTR = self._project(x_BTD, rope)
        entries_BSW = None if cache is None else cache.write(self.layer_index, latent_BTC, k_rope_BTR)
        if cache is None or entries_BSW is None or cache.length == 0:
            out_BTHV = self._attend_expanded(q_nope_BTHN, q_rope_BTHR, latent_BTC, k_rope_BTR, mask_B1TS)
        else:
            out_BTHV = self._attend_absorbed(q_nope_BTHN, q_rope_BTHR, entries_BSW, mask_B1TS)
        return self.o_proj(out_BTHV.flatten(2))

    def _project(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The unrotated (B, T, H, N) and rotated (B, T, H, R) queries, and what a token leaves behind: its normalised
        latent (B, T, C) and its one rotated key (B, T, R)."""
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
        q_nope_BTHN: Tensor,
        q_rope_BTHR: Tensor,
        latent_BTC: Tensor,
        k_rope_BTR: Tensor,
        mask_B1TS: Tensor | None,
    ) -> Tensor:
        """Attention within a window, every head's keys and values expanded from the latents: (B, T, H, V)."""
        kv = self.kv_b_proj(latent_BTC).unflatten(-1, (self.num_heads, -1))
        k_nope_BTHN, v_BTHV = kv.split([self.nope_dim, self.v_head_dim], dim=-1)
        k_rope_BTHR = k_rope_BTR.unsqueeze(2).expand_as(q_rope_BTHR)
        q_BTHQ = torch.cat((q_nope_BTHN, q_rope_BTHR), dim=-1)
        k_BTHQ = torch.cat((k_nope_BTHN, k_rope_BTHR), dim=-1)
        # The fused CPU and CUDA kernels want equal head sizes; zero columns are cheaper than falling back.
        v_BTHQ = F.pad(v_BTHV, (0, max(0, q_BTHQ.shape[-1] - self.v_head_dim)))
        out_BHTQ = F.scaled_dot_product_attention(
            q_BTHQ.transpose(1, 2),
            k_BTHQ.transpose(1, 2),
            v_BTHQ.transpose(1, 2),
            attn_mask=mask_B1TS,
            is_causal=mask_B1TS is None,
            dropout_p=self.attention_dropout if self.training else 0.0,
            scale=self.scaling,
        )
        return out_BHTQ[..., : self.v_head_dim].transpose(1, 2)

    def _attend_absorbed(
        self, q_nope_BTHN: Tensor, q_rope_BTHR: Tensor, entries_BSW: Tensor, mask_B1TS: Tensor | None
    ) -> Tensor:
        """Attention to the cache itself, W_UK absorbed into the query and W_UV into the output: (B, T, H, V).

        q (W_UK c) = (q W_UK) c (DeepSeek-V2, section 2.1.2), so all heads share one key, the cache entry, and one
        value, its latent; the value keeps the key's R columns, to be dropped after, for the fused kernels' sake.
        """
        up_k_HNC, up_v_HCV = self.absorbed or self.up_projections()
        q_latent_BTHC = _per_head(q_nope_BTHN, up_k_HNC)
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
        return _per_head(out_BTHW[..., : self.kv_lora_rank], up_v_HCV)

    def up_projections(self) -> tuple[Tensor, Tensor]:
        """W_UK (H, N, C) and the transpose of W_UV (H, C, V), views of `kv_b_proj`."""
        up_HXC = self.kv_b_proj.weight.unflatten(0, (self.num_heads, -1))
        up_k_HNC, up_v_HVC = up_HXC.split([self.nope_dim, self.v_head_dim], dim=1)
        return up_k_HNC, up_v_HVC.transpose(1, 2)


def _per_head(x_BTHI: Tensor, weight_HIO: Tensor) -> Tensor:
    """Each head's vectors through its own matrix, (B, T, H, O), in the matrices' dtype and back."""
    x_HMI = x_BTHI.flatten(0, 1).transpose(0, 1).to(weight_HIO.dtype)
    return torch.bmm(x_HMI, weight_HIO).transpose(0, 1).unflatten(0, x_BTHI.shape[:2]).to(x_BTHI.dtype)


def _attend_one_token(q_B1HW: Tensor, entries_B1SW: Tensor, mask_B1TS: Tensor | None, scaling: float) -> Tensor:
    """One token's heads, whose keys are the same: as the rows of one attention twice as fast as broadcast heads.

    The CPU's kernel gives a sequence one thread, so a long cache of one sequence is read in parts, put together by
    their log-sum-exp (flash-decoding).
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
    out = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q_BPHW, entries_BPSW, entries_BPSW, scale=scaling)
    return out[0], out[1]

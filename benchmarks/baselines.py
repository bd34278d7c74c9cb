"""Published conversions to multi-head latent attention, written here from their papers to be compared with.

TransMLA (Meng et al. 2025, arXiv 2502.07864): a rotation that gathers the rotated keys, then balanced joint PCA.
X-EcoMLA (Li et al. 2025, arXiv 2503.11132): SVD of the weights alone, and the average of the heads' keys to rotate.
Models come back in memory as our `DeepseekV3`, which `smolseek.checkpoint.hub.save` writes as a stock folder.

Shapes: D hidden, H heads, G KV heads, d head_dim, F = d / 2 frequencies, K = G * d key (or value) channels,
Y keys and values, C = K / 2 complex key channels, S rope slots, M = K - 2S unrotated key channels, R latent rank,
N windows, T tokens, X tokens of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DeepseekV3Config

from smolseek.config import ConvertSettings
from smolseek.conversion.attention import complex_moment, interleave, to_complex
from smolseek.conversion.moments import NORM_EPS
from smolseek.conversion.target import read_source, target_config
from smolseek.model import DeepseekV3
from smolseek.model.attention import MultiheadLatentAttention

_WINDOWS_AT_ONCE = 8


class Weights(NamedTuple):
    """A dense attention block's projections in float64: query (H * d, D), key and value (K, D)."""

    query: Tensor
    key: Tensor
    value: Tensor


class Sizes(NamedTuple):
    """Numbers kept per token and layer: kv_lora_rank and qk_rope_head_dim."""

    rank: int
    rope: int


@dataclass(frozen=True)
class Cut:
    """TransMLA at one rank: each model is the one before it and one thing more."""

    joint_pca: DeepseekV3
    """Rank cut by PCA, no latent norm."""
    published: DeepseekV3
    """Stock V3 with the latent norm and its published gain, E[1/rms] of the latent and the rotated key together."""
    repaired: DeepseekV3
    """Stock V3 with the gain that was meant, E[rms] of the latent."""


# -- algebra ----------------------------------------------------------------------------------------------------------


def rorope(key_KK: Tensor, head_dim: int, fold: int, stride: int) -> Tensor:
    """RoRoPE with FreqFold: an orthogonal matrix (C, C) whose first S rows are what keeps its rotation.

    Per group of `fold` neighbouring frequencies, real PCA over (KV head, frequency) with real and imaginary parts as
    samples alike, from the uncentred moment E[k kᵀ] (K, K). The top fold / stride components of a group keep rotating,
    at every stride-th of its frequencies, fastest first; the rest follow in order of the groups.
    """
    moment_CC = complex_moment(key_KK, head_dim).real
    channels_GF = torch.arange(len(moment_CC)).view(-1, head_dim // 2)
    kept, rest = [], []
    for first in range(0, head_dim // 2, fold):
        picked = channels_GF[:, first : first + fold].flatten()
        vectors = torch.linalg.eigh(moment_CC[picked[:, None], picked]).eigenvectors.flip(-1)
        rows = moment_CC.new_zeros(len(picked), len(moment_CC))
        rows[:, picked] = vectors.mT
        kept.append(rows[: fold // stride])
        rest.append(rows[fold // stride :])
    return torch.cat(kept + rest)


def real_rows(rows_XC: Tensor, head_dim: int) -> Tensor:
    """Real mixing of complex channels (X, C) as mixing of key channels (2X, K): real parts, then imaginary parts."""
    half = head_dim // 2
    rows_XGF = rows_XC.view(len(rows_XC), rows_XC.shape[1] // half, half)
    nothing = torch.zeros_like(rows_XGF)
    parts = [torch.cat(pair, dim=-1).flatten(1) for pair in ((rows_XGF, nothing), (nothing, rows_XGF))]
    return torch.cat(parts)


def transmla_block(
    weights: Weights, key_KK: Tensor, input_DD: Tensor, *, head_dim: int, fold: int, sizes: Sizes
) -> dict[str, Tensor]:
    """One block: rotation from `key_KK` (E[k kᵀ] of the dense model), key-value balance and joint PCA from `input_DD`
    (E[x xᵀ] of the partly rotated model), the encoder's transpose as decoder."""
    slots = sizes.rope // 2
    rotation_CC = rorope(key_KK, head_dim, fold, head_dim // sizes.rope)
    rest_MK = real_rows(rotation_CC[slots:], head_dim)
    key_MD = rest_MK @ weights.key
    balance = _mean_norm(key_MD, input_DD) / _mean_norm(weights.value, input_DD) if len(key_MD) else 1.0
    joint_YD = torch.cat([key_MD / balance, weights.value])
    encoder_YR = torch.linalg.eigh(joint_YD @ input_DD @ joint_YD.mT).eigenvectors.flip(-1)[:, : sizes.rank]
    up_k_KR = balance * rest_MK.mT @ encoder_YR[: len(key_MD)]
    return stock_block(
        weights,
        head_dim,
        slot_encoder_SC=rotation_CC[:slots],
        slot_decoder_CS=rotation_CC[:slots].mT,
        encoder_RD=encoder_YR.mT @ joint_YD,
        up_k_KR=up_k_KR,
        up_v_KR=encoder_YR[len(key_MD) :],
    )


def x_ecomla_block(weights: Weights, *, head_dim: int, sizes: Sizes) -> dict[str, Tensor]:
    """One block from the weights alone: the joint SVD of [W_k; W_v], singular values on the decoder's side; the rotated
    key is the KV heads' mean at every (head_dim / rope)-th frequency.

    Those key channels are left out of the SVD; the whole [W_k; W_v] (as published) spends rank on keys that nothing
    reads, and was worse nearly everywhere that it was tried.
    """
    half, kv_channels = head_dim // 2, len(weights.key)
    kv_heads = kv_channels // head_dim
    rotated_F = torch.arange(half) % (head_dim // sizes.rope) == 0
    joint_YD = torch.cat([weights.key, weights.value])
    joint_YD[:kv_channels][rotated_F.repeat(2 * kv_heads)] = 0
    u_YD, values_D, v_DD = torch.linalg.svd(joint_YD, full_matrices=False)
    one_CS = torch.eye(half, dtype=torch.float64)[:, rotated_F].repeat(kv_heads, 1)
    up_k_KR, up_v_KR = (u_YD * values_D)[:, : sizes.rank].split(kv_channels)
    return stock_block(
        weights,
        head_dim,
        slot_encoder_SC=one_CS.mT / kv_heads,
        slot_decoder_CS=one_CS,
        encoder_RD=v_DD[: sizes.rank],
        up_k_KR=up_k_KR,
        up_v_KR=up_v_KR,
    )


def stock_block(
    weights: Weights,
    head_dim: int,
    *,
    slot_encoder_SC: Tensor,
    slot_decoder_CS: Tensor,
    encoder_RD: Tensor,
    up_k_KR: Tensor,
    up_v_KR: Tensor,
) -> dict[str, Tensor]:
    """Tensors under `self_attn.` of a V3 block, gain 1: key slots and latent as encoded, and decoded per KV head.

    Real slot mixing acts on real and imaginary parts alike. The query takes up the decoder of its KV head's slots, and
    what V3's softmax scale, (head_dim + 2S)^-½, differs by.
    """
    key_CD, query_CD = to_complex(weights.key, head_dim), to_complex(weights.query, head_dim)
    query_HFD = query_CD.view(-1, head_dim // 2, query_CD.shape[-1])
    decoder_GFS = slot_decoder_CS.to(query_CD.dtype).view(-1, head_dim // 2, slot_decoder_CS.shape[-1])
    per_group = len(query_HFD) // len(decoder_GFS)
    q_rope_HSD = decoder_GFS.repeat_interleave(per_group, dim=0).mH @ query_HFD
    query = torch.cat([weights.query.view(len(query_HFD), head_dim, -1), interleave(q_rope_HSD)], dim=1)
    up_GXR = torch.cat([up.view(len(decoder_GFS), head_dim, -1) for up in (up_k_KR, up_v_KR)], dim=1)
    return {
        "q_proj.weight": query.flatten(0, 1) * math.sqrt(query.shape[1] / head_dim),
        "kv_a_proj_with_mqa.weight": torch.cat([encoder_RD, interleave(slot_encoder_SC.to(key_CD.dtype) @ key_CD)]),
        "kv_a_layernorm.weight": torch.ones_like(encoder_RD[:, 0]),
        "kv_b_proj.weight": up_GXR.repeat_interleave(per_group, dim=0).flatten(0, 1),
    }


def _mean_norm(rows_YD: Tensor, input_DD: Tensor) -> float:
    """Mean over channels of their root mean square."""
    return float(((rows_YD @ input_DD) * rows_YD).sum(-1).clamp(min=0).sqrt().mean())


# -- models -----------------------------------------------------------------------------------------------------------


class TransMLA:
    """TransMLA of a dense transformers model and its config.json at one width of the rotated key.

    Calibrated on `windows_NT` alone: `fold` is the folding whose partly rotated model (`partial_rope`: keys and values
    whole, no latent norm) has the lowest loss there, of head_dim / rope times 1, 2, 4, ...
    """

    def __init__(self, dense: Any, config: dict[str, Any], windows_NT: Tensor, rope: int) -> None:
        self.dense, self.config, self.windows_NT, self.rope = dense, config, windows_NT, rope
        source = read_source(config)
        self.head_dim = source["head_dim"]
        whole = 2 * source["num_key_value_heads"] * self.head_dim - rope
        self.weights = [block_weights(layer) for layer in dense.model.layers]
        inputs = input_moments(dense, windows_NT)
        self.keys = [w.key @ x_DD @ w.key.mT for w, x_DD in zip(self.weights, inputs, strict=True)]
        stride = self.head_dim // rope
        folds = [stride << i for i in range(self.head_dim) if self.head_dim // 2 % (stride << i) == 0]
        models = {fold: self._assemble(self._blocks(inputs, fold, whole)) for fold in folds}
        self.fold = min(folds, key=lambda fold: mean_loss(models[fold], windows_NT))
        self.partial_rope = models[self.fold]
        self.inputs = input_moments(self.partial_rope, windows_NT)

    def cut(self, rank: int) -> Cut:
        """The stages that follow the rotation, at this rank."""
        blocks = self._blocks(self.inputs, self.fold, rank)
        plain, unit = self._assemble(blocks), self._assemble(blocks, [1.0] * len(blocks))
        published = latent_means(unit, self.windows_NT, lambda out: torch.rsqrt(out.square().mean(-1) + NORM_EPS))
        repaired = latent_means(plain, self.windows_NT, lambda out: out[:, :rank].square().mean(-1).sqrt())
        return Cut(plain, self._assemble(blocks, published), self._assemble(blocks, repaired))

    def _blocks(self, inputs: list[Tensor], fold: int, rank: int) -> list[dict[str, Tensor]]:
        sizes = Sizes(rank, self.rope)
        layers = zip(self.weights, self.keys, inputs, strict=True)
        return [transmla_block(*layer, head_dim=self.head_dim, fold=fold, sizes=sizes) for layer in layers]

    def _assemble(self, blocks: list[dict[str, Tensor]], gains: list[float] | None = None) -> DeepseekV3:
        return assemble(self.dense, self.config, blocks, self.rope, gains=gains)


def x_ecomla(dense: Any, config: dict[str, Any], windows_NT: Tensor, sizes: Sizes) -> DeepseekV3:
    """X-EcoMLA's initialisation in stock form; `windows_NT` sets nothing but the latent norm's gain, E[rms]."""
    head_dim = read_source(config)["head_dim"]
    blocks = [x_ecomla_block(block_weights(layer), head_dim=head_dim, sizes=sizes) for layer in dense.model.layers]
    plain = assemble(dense, config, blocks, sizes.rope)
    gains = latent_means(plain, windows_NT, lambda out: out[:, : sizes.rank].square().mean(-1).sqrt())
    return assemble(dense, config, blocks, sizes.rope, gains=gains)


def assemble(
    dense: Any,
    config: dict[str, Any],
    blocks: list[dict[str, Tensor]],
    rope: int,
    *,
    gains: list[float] | None = None,
) -> DeepseekV3:
    """The model with these attention blocks, its other weights shared with the dense one, its MLPs dense.

    `gains` is each layer's kv_a_layernorm; without them there is no latent norm, and the model is not stock V3.
    """
    rank = len(blocks[0]["kv_a_layernorm.weight"])
    settings = ConvertSettings(kv_lora_rank=1, qk_rope_head_dim=rope)  # a whole latent may be wider than it allows
    target = DeepseekV3Config(**target_config(config, settings) | {"kv_lora_rank": rank})
    with torch.device("meta"):
        model = DeepseekV3(target)
    model.model.rotary_emb = type(model.model.rotary_emb)(target)
    state = {name: tensor for name, tensor in dense.state_dict().items() if name in model.state_dict()}
    for index, block in enumerate(blocks):
        if gains is not None:
            block = block | {"kv_a_layernorm.weight": torch.full((rank,), gains[index])}
        state |= {f"model.layers.{index}.self_attn.{name}": tensor.float() for name, tensor in block.items()}
    model.load_state_dict(state, assign=True)
    if gains is None:
        for module in model.modules():
            if isinstance(module, MultiheadLatentAttention):
                module.kv_a_layernorm = nn.Identity()  # type: ignore[assignment]
    return model.eval()


# -- calibration ------------------------------------------------------------------------------------------------------


def input_moments(model: Any, windows_NT: Tensor) -> list[Tensor]:
    """Per layer, E[x xᵀ] (D, D) in float64 of the normed input of the attention block; a dense model's or ours."""
    return _means(model, windows_NT, "input_layernorm", lambda x_XD: x_XD.mT @ x_XD)


def latent_means(model: DeepseekV3, windows_NT: Tensor, of: Callable[[Tensor], Tensor]) -> list[float]:
    """Per layer, the mean over tokens of `of` the down-projection's output, latent and rotated key (X, R + 2S)."""
    down = "self_attn.kv_a_proj_with_mqa"
    return [float(mean) for mean in _means(model, windows_NT, down, lambda out_XW: of(out_XW).sum())]


@torch.no_grad()
def mean_loss(model: DeepseekV3, windows_NT: Tensor) -> float:
    """Mean next-token loss over windows, in nats."""
    losses = [
        F.cross_entropy(model(ids_BT)[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="sum").item()
        for ids_BT in windows_NT.split(_WINDOWS_AT_ONCE)
    ]
    return sum(losses) / windows_NT[:, 1:].numel()


@torch.no_grad()
def _means(model: Any, windows_NT: Tensor, module: str, sum_of: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Per layer, the mean over tokens of what `module` puts out, (X, channels) a batch, summed by `sum_of`."""
    sums: list[Any] = [0.0 for _ in model.model.layers]

    def add(index: int, out: Tensor) -> None:
        sums[index] = sums[index] + sum_of(out.flatten(0, -2).double())

    handles = [
        layer.get_submodule(module).register_forward_hook(lambda _, args, out, i=index: add(i, out))
        for index, layer in enumerate(model.model.layers)
    ]
    try:
        for ids_BT in windows_NT.split(_WINDOWS_AT_ONCE):
            model(ids_BT)
    finally:
        for handle in handles:
            handle.remove()
    return [total / windows_NT.numel() for total in sums]


def supports(dense: Any) -> bool:
    """Whether these baselines are written for such a model: no biases, no q/k norms, RoPE in every layer."""
    blocks = [layer.self_attn for layer in dense.model.layers]
    plain = all(block.q_proj.bias is None and not hasattr(block, "q_norm") for block in blocks)
    return plain and all(getattr(dense.config, "no_rope_layers", None) or [True])


def block_weights(layer: Any) -> Weights:
    """The projections of a dense transformers layer."""
    attention = layer.self_attn
    weights = (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)
    return Weights(*(weight.detach().double() for weight in weights))

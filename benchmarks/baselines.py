"""Published conversions to multi-head latent attention, written from their papers, to compare ours with.

TransMLA (Meng et al. 2025, arXiv 2502.07864): a rotation that gathers the rotated keys, then balanced joint PCA.
X-EcoMLA (Li et al. 2025, arXiv 2503.11132): SVD of the weights alone; the rotated key is the mean of the heads' keys.
Every conversion is a `DeepseekV3` in memory; `smolseek.checkpoint.hub.save` writes it as a stock folder.

Shapes: D hidden_size, H num_attention_heads, G num_key_value_heads, d head_dim, F = d / 2 rotary frequencies,
k = G × d key (or value) channels, Y = 2 k, c = k / 2 complex key channels, s = R / 2 rope slots, C kv_lora_rank,
W = C + R, B windows, T tokens in each, N tokens in one row, O = Z + k rows (Z unrotated key channels, then values).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DeepseekV3Config

from smolseek.config import ConvertSettings
from smolseek.conversion.mla.heads import scale_queries
from smolseek.conversion.mla.rope_slots import complex_moment, interleave, rotated_queries, to_complex
from smolseek.conversion.target import target_config
from smolseek.formats.dense import DenseSource, read_source
from smolseek.model import DeepseekV3
from smolseek.model.attention import LATENT_NORM_EPS, MultiheadLatentAttention

_WINDOWS_AT_ONCE = 8
FEW_WINDOWS = 8
"""Windows that are enough for a gain of one number a layer, or to see which of some models is best."""


class Weights(NamedTuple):
    """A dense attention block's projections in float64: query (H × d, D), key and value (k, D)."""

    query: Tensor
    key: Tensor
    value: Tensor


class Sizes(NamedTuple):
    """Numbers kept per token and layer: kv_lora_rank and qk_rope_head_dim."""

    rank: int
    rope: int


@dataclass(frozen=True)
class Cut:
    """TransMLA at one rank; each model adds one step to the model before it."""

    joint_pca: DeepseekV3
    """Rank cut by PCA, no latent norm."""
    published: DeepseekV3
    """Stock V3 with the latent norm and its published gain, E[1/rms] of the latent and the rotated key together."""
    repaired: DeepseekV3
    """Stock V3 with the gain that was meant, E[rms] of the latent."""


# -- algebra ----------------------------------------------------------------------------------------------------------


def rorope(key_kk: Tensor, head_dim: int, fold: int, stride: int) -> Tensor:
    """Returns RoRoPE with FreqFold: an orthogonal matrix (c, c) whose first s rows keep their rotation.

    Each group of `fold` neighbouring frequencies has a real PCA over (KV head, frequency), from the uncentred moment
    E[k kᵀ] (k, k); real and imaginary parts count as samples alike. The top fold / stride components of a group keep
    rotating, at every stride-th of its frequencies, fastest first. The other components follow, group by group.
    """
    moment_cc = complex_moment(key_kk, head_dim).real
    channels_GF = torch.arange(len(moment_cc)).view(-1, head_dim // 2)
    kept, rest = [], []
    for first in range(0, head_dim // 2, fold):
        picked = channels_GF[:, first : first + fold].flatten()
        vectors = torch.linalg.eigh(moment_cc[picked[:, None], picked]).eigenvectors.flip(-1)
        rows = moment_cc.new_zeros(len(picked), len(moment_cc))
        rows[:, picked] = vectors.mT
        kept.append(rows[: fold // stride])
        rest.append(rows[fold // stride :])
    return torch.cat(kept + rest)


def real_rows(rows_Zc: Tensor, head_dim: int) -> Tensor:
    """Returns a real mixture of complex channels (Z, c) as a mixture of key channels (2 Z, k), real parts first."""
    half = head_dim // 2
    rows_ZGF = rows_Zc.view(len(rows_Zc), rows_Zc.shape[1] // half, half)
    nothing = torch.zeros_like(rows_ZGF)
    parts = [torch.cat(pair, dim=-1).flatten(1) for pair in ((rows_ZGF, nothing), (nothing, rows_ZGF))]
    return torch.cat(parts)


def transmla_block(
    weights: Weights, key_kk: Tensor, input_DD: Tensor, *, head_dim: int, fold: int, sizes: Sizes
) -> dict[str, Tensor]:
    """Returns one block's tensors; the decoder is the encoder's transpose.

    The rotation comes from `key_kk` (E[k kᵀ] of the dense model), the balance of keys and values and the joint PCA from
    `input_DD` (E[x xᵀ] of the partly rotated model).
    """
    slots = sizes.rope // 2
    rotation_cc = rorope(key_kk, head_dim, fold, head_dim // sizes.rope)
    rest_Zk = real_rows(rotation_cc[slots:], head_dim)
    key_ZD = rest_Zk @ weights.key
    balance = _mean_norm(key_ZD, input_DD) / _mean_norm(weights.value, input_DD) if len(key_ZD) else 1.0
    joint_OD = torch.cat([key_ZD / balance, weights.value])
    encoder_OC = torch.linalg.eigh(joint_OD @ input_DD @ joint_OD.mT).eigenvectors.flip(-1)[:, : sizes.rank]
    up_k_kC = balance * rest_Zk.mT @ encoder_OC[: len(key_ZD)]
    return stock_block(
        weights,
        head_dim,
        slot_encoder_sc=rotation_cc[:slots],
        slot_decoder_cs=rotation_cc[:slots].mT,
        encoder_CD=encoder_OC.mT @ joint_OD,
        up_k_kC=up_k_kC,
        up_v_kC=encoder_OC[len(key_ZD) :],
    )


def x_ecomla_block(weights: Weights, *, head_dim: int, sizes: Sizes) -> dict[str, Tensor]:
    """Returns one block's tensors, from the weights alone: the joint SVD of [W_k; W_v].

    The singular values go to the decoder. The rotated key is the KV heads' mean at every (head_dim / rope)-th
    frequency. Those key channels are left out of the SVD: the published SVD of the whole [W_k; W_v] spends rank on keys
    that nothing reads, and was worse in nearly every trial.
    """
    half, kv_channels = head_dim // 2, len(weights.key)
    kv_heads = kv_channels // head_dim
    rotated_F = torch.arange(half) % (head_dim // sizes.rope) == 0
    joint_YD = torch.cat([weights.key, weights.value])
    joint_YD[:kv_channels][rotated_F.repeat(2 * kv_heads)] = 0
    u_YZ, values_Z, v_ZD = torch.linalg.svd(joint_YD, full_matrices=False)
    one_cs = torch.eye(half, dtype=torch.float64)[:, rotated_F].repeat(kv_heads, 1)
    up_k_kC, up_v_kC = (u_YZ * values_Z)[:, : sizes.rank].split(kv_channels)
    return stock_block(
        weights,
        head_dim,
        slot_encoder_sc=one_cs.mT / kv_heads,
        slot_decoder_cs=one_cs,
        encoder_CD=v_ZD[: sizes.rank],
        up_k_kC=up_k_kC,
        up_v_kC=up_v_kC,
    )


def stock_block(
    weights: Weights,
    head_dim: int,
    *,
    slot_encoder_sc: Tensor,
    slot_decoder_cs: Tensor,
    encoder_CD: Tensor,
    up_k_kC: Tensor,
    up_v_kC: Tensor,
) -> dict[str, Tensor]:
    """Returns the tensors under `self_attn.` of a V3 block whose latent norm has gain 1.

    A real mixture of slots acts on real and imaginary parts alike. The query absorbs the decoder of its KV head's slots
    and the difference between the two softmax scales.
    """
    key_cD = to_complex(weights.key, head_dim)
    q_nope_HdD = weights.query.view(-1, head_dim, weights.query.shape[-1])
    q_rope_HsD = rotated_queries(weights.query, slot_decoder_cs.to(key_cD.dtype), head_dim)
    up_GZC = torch.cat([up.view(-1, head_dim, up.shape[-1]) for up in (up_k_kC, up_v_kC)], dim=1)
    return {
        "q_proj.weight": scale_queries(q_nope_HdD, q_rope_HsD, head_dim).flatten(0, 1),
        "kv_a_proj_with_mqa.weight": torch.cat([encoder_CD, interleave(slot_encoder_sc.to(key_cD.dtype) @ key_cD)]),
        "kv_a_layernorm.weight": torch.ones_like(encoder_CD[:, 0]),
        "kv_b_proj.weight": up_GZC.repeat_interleave(len(q_nope_HdD) // len(up_GZC), dim=0).flatten(0, 1),
    }


def _mean_norm(rows_OD: Tensor, input_DD: Tensor) -> float:
    """Returns the mean over channels of their root mean square."""
    return float(((rows_OD @ input_DD) * rows_OD).sum(-1).clamp(min=0).sqrt().mean())


# -- models -----------------------------------------------------------------------------------------------------------


class TransMLA:
    """TransMLA of a dense transformers model and its config.json at one width of the rotated key.

    `fold` is head_dim / rope times 1, 2, 4 and so on: the factor whose partly rotated model (`partial_rope`: keys and
    values whole, no latent norm) has the lowest loss on the first of `windows_BT`. Only these windows calibrate it.
    """

    def __init__(self, dense: Any, config: dict[str, Any], windows_BT: Tensor, rope: int) -> None:
        self.dense, self.config, self.windows_BT, self.rope = dense, config, windows_BT, rope
        source = read_source(config)
        self.head_dim = source.head_dim
        whole = source.cache_numbers - rope
        self.weights = [block_weights(layer) for layer in dense.model.layers]
        inputs = input_moments(dense, windows_BT)
        self.keys = [w.key @ x_DD @ w.key.mT for w, x_DD in zip(self.weights, inputs, strict=True)]
        stride = self.head_dim // rope
        folds = [stride << i for i in range(self.head_dim) if self.head_dim // 2 % (stride << i) == 0]
        models = {fold: self._assemble(self._blocks(inputs, fold, whole)) for fold in folds}
        self.fold = min(folds, key=lambda fold: mean_loss(models[fold], windows_BT[:FEW_WINDOWS]))
        self.partial_rope = models[self.fold]
        self.inputs = input_moments(self.partial_rope, windows_BT)

    def cut(self, rank: int) -> Cut:
        """Returns the steps that follow the rotation, at this rank."""
        blocks = self._blocks(self.inputs, self.fold, rank)
        plain, unit = self._assemble(blocks), self._assemble(blocks, [1.0] * len(blocks))
        published = latent_means(
            unit, self.windows_BT, lambda out_NW: torch.rsqrt(out_NW.square().mean(-1) + LATENT_NORM_EPS)
        )
        repaired = latent_means(plain, self.windows_BT, lambda out_NW: out_NW[:, :rank].square().mean(-1).sqrt())
        return Cut(plain, self._assemble(blocks, published), self._assemble(blocks, repaired))

    def _blocks(self, inputs: list[Tensor], fold: int, rank: int) -> list[dict[str, Tensor]]:
        sizes = Sizes(rank, self.rope)
        layers = zip(self.weights, self.keys, inputs, strict=True)
        return [transmla_block(*layer, head_dim=self.head_dim, fold=fold, sizes=sizes) for layer in layers]

    def _assemble(self, blocks: list[dict[str, Tensor]], gains: list[float] | None = None) -> DeepseekV3:
        return assemble(self.dense, self.config, blocks, self.rope, gains=gains)


def x_ecomla(dense: Any, config: dict[str, Any], windows_BT: Tensor, sizes: Sizes) -> DeepseekV3:
    """Returns X-EcoMLA's initialisation in stock form; `windows_BT` sets only the latent norm's gain, E[rms]."""
    head_dim = read_source(config).head_dim
    blocks = [x_ecomla_block(block_weights(layer), head_dim=head_dim, sizes=sizes) for layer in dense.model.layers]
    plain = assemble(dense, config, blocks, sizes.rope)
    gains = latent_means(plain, windows_BT, lambda out_NW: out_NW[:, : sizes.rank].square().mean(-1).sqrt())
    return assemble(dense, config, blocks, sizes.rope, gains=gains)


def assemble(
    dense: Any,
    config: dict[str, Any],
    blocks: list[dict[str, Tensor]],
    rope: int,
    *,
    gains: list[float] | None = None,
) -> DeepseekV3:
    """Returns the model with these attention blocks and dense MLPs; it shares its other weights with the dense model.

    `gains` are each layer's kv_a_layernorm. Without them there is no latent norm, and the model is not stock V3.
    """
    rank = len(blocks[0]["kv_a_layernorm.weight"])
    settings = ConvertSettings(kv_lora_rank=1, qk_rope_head_dim=rope)  # a whole latent may be wider than it allows
    target = DeepseekV3Config(**target_config(read_source(config), settings) | {"kv_lora_rank": rank})
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


def ways_to_split(source: DenseSource, total: int) -> list[Sizes]:
    """Returns the ways to divide `total` between rank and rope; these baselines need a rope that divides the head."""
    ropes = [source.head_dim // part for part in (1, 2, 4) if source.head_dim % (2 * part) == 0]
    return [Sizes(total - rope, rope) for rope in ropes if 1 <= total - rope <= source.cache_numbers - rope]


# -- calibration ------------------------------------------------------------------------------------------------------


def input_moments(model: Any, windows_BT: Tensor) -> list[Tensor]:
    """Returns for each layer E[x xᵀ] (D, D), float64, of the attention block's normed input; a dense model or ours."""
    return _means(model, windows_BT, "input_layernorm", lambda x_ND: x_ND.mT @ x_ND)


def latent_means(model: DeepseekV3, windows_BT: Tensor, of: Callable[[Tensor], Tensor]) -> list[float]:
    """Returns for each layer the mean, over the first windows, of `of`(latents and rotated keys, (N, W))."""
    down = "self_attn.kv_a_proj_with_mqa"
    return [float(mean) for mean in _means(model, windows_BT[:FEW_WINDOWS], down, lambda out_NW: of(out_NW).sum())]


@torch.no_grad()
def mean_loss(model: DeepseekV3, windows_BT: Tensor) -> float:
    """Returns the mean next-token loss over windows, in nats."""
    losses = [
        F.cross_entropy(model(ids_BT)[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="sum").item()
        for ids_BT in windows_BT.split(_WINDOWS_AT_ONCE)
    ]
    return sum(losses) / windows_BT[:, 1:].numel()


@torch.no_grad()
def _means(model: Any, windows_BT: Tensor, module: str, sum_of: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Returns for each layer the mean over tokens of a module's output; `sum_of` sums one batch (N, channels)."""
    sums: list[Any] = [0.0 for _ in model.model.layers]

    def add(index: int, out: Tensor) -> None:
        sums[index] = sums[index] + sum_of(out.flatten(0, -2).double())

    handles = [
        layer.get_submodule(module).register_forward_hook(lambda _, args, out, i=index: add(i, out))
        for index, layer in enumerate(model.model.layers)
    ]
    try:
        for ids_BT in windows_BT.split(_WINDOWS_AT_ONCE):
            model(ids_BT)
    finally:
        for handle in handles:
            handle.remove()
    return [total / windows_BT.numel() for total in sums]


def supports(dense: Any) -> bool:
    """Returns whether these baselines apply to the model: no biases, no q and k norms, RoPE in every layer."""
    blocks = [layer.self_attn for layer in dense.model.layers]
    plain = all(block.q_proj.bias is None and not hasattr(block, "q_norm") for block in blocks)
    return plain and all(getattr(dense.config, "no_rope_layers", None) or [True])


def block_weights(layer: Any) -> Weights:
    """Returns the projections of a dense transformers layer."""
    attention = layer.self_attn
    weights = (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)
    return Weights(*(weight.detach().double() for weight in weights))

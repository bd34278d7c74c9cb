"""The tensors of a GGUF file of architecture deepseek2, read one at a time from a DeepSeek-V3 folder.

Shapes: D hidden_size, H num_attention_heads, U qk_nope_head_dim, R qk_rope_head_dim, Q = U + R, v v_head_dim,
C kv_lora_rank, E n_routed_experts, i moe_intermediate_size, O outputs and A inputs of a linear map; ggml lists
dimensions in the reverse order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from gguf import MODEL_ARCH, get_tensor_name_map
from torch import Tensor

from smolseek.checkpoint.folder import TensorFolder
from smolseek.export.keys import query_scales
from smolseek.formats.deepseek_v3 import expected_tensors


@dataclass(frozen=True)
class ExportTensor:
    """A tensor of the GGUF file: its name there, its shape, and a function that reads it in fp32."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def keeps_fp32(self) -> bool:
        """Whether the tensor is always stored in fp32: norms, routing biases and routers.

        They are small, and llama.cpp computes with them in fp32.
        """
        return len(self.shape) == 1 or "ffn_gate_inp." in self.name


def export_tensors(tensors: TensorFolder, config: dict[str, Any]) -> Iterator[ExportTensor]:
    """Yields all tensors of the GGUF file, with each layer's experts stacked and `kv_b_proj` split in two.

    `config` must have its defaults filled in, and the tensors must fit it (`runtimes.check`).
    """
    names = get_tensor_name_map(MODEL_ARCH.DEEPSEEK2, config["num_hidden_layers"])
    for name, shape in expected_tensors(config).items():
        for converted in _convert(tensors, config, name, shape):
            mapped_name = converted.name.replace("e_score_correction_bias", "e_score_correction.bias")
            gguf_name = names.get_name(mapped_name, (".weight", ".bias"))
            assert gguf_name is not None, mapped_name
            yield dataclasses.replace(converted, name=gguf_name)


def _convert(
    tensors: TensorFolder, config: dict[str, Any], name: str, shape: tuple[int, ...]
) -> Iterator[ExportTensor]:
    """Yields the tensors that one tensor of the folder becomes, under the folder's names.

    `kv_b_proj` becomes two tensors. The first expert becomes the stack of all experts, and the other experts nothing.
    """
    prefix, _, kind = name.removesuffix(".weight").rpartition(".")
    read = partial(_read, tensors, name)
    heads, nope, value = (config[field] for field in ("num_attention_heads", "qk_nope_head_dim", "v_head_dim"))
    if ".mlp.experts." in name:
        experts, _, number = prefix.rpartition(".")
        if number == "0":
            stack = partial(_stack_experts, tensors, config, experts, kind)
            yield ExportTensor(f"{experts}.{kind}.weight", (config["n_routed_experts"], *shape), stack)
    elif kind == "kv_b_proj":
        yield ExportTensor(f"{prefix}.k_b_proj.weight", (heads, shape[1], nope), partial(_split_kv_b, read, config, 0))
        yield ExportTensor(f"{prefix}.v_b_proj.weight", (heads, value, shape[1]), partial(_split_kv_b, read, config, 1))
    elif kind == "kv_a_layernorm":
        read_kv_b = partial(_read, tensors, f"{prefix}.kv_b_proj.weight")
        yield ExportTensor(name, shape, lambda: read() * _latent_scales(read_kv_b(), config))
    elif kind in ("q_proj", "q_b_proj"):
        yield ExportTensor(name, shape, partial(_scaled_queries, read, config))
    else:
        yield ExportTensor(name, shape, read)


def _read(tensors: TensorFolder, name: str) -> Tensor:
    """Returns one tensor in fp32; raises ValueError if it holds NaN or infinity."""
    tensor = tensors.get(name).float()
    if not torch.isfinite(tensor).all():
        raise ValueError(f"tensor {name}: holds NaN or infinity; fetch the checkpoint again or name another")
    return tensor


def _stack_experts(tensors: TensorFolder, config: dict[str, Any], experts: str, kind: str) -> Tensor:
    """Returns one projection of all routed experts of a layer: (E, i, D) or (E, D, i)."""
    return torch.stack([_read(tensors, f"{experts}.{e}.{kind}.weight") for e in range(config["n_routed_experts"])])


def _split_kv_b(read: Callable[[], Tensor], config: dict[str, Any], half: int) -> Tensor:
    """Returns one half of `kv_b_proj`.

    Half 0 makes keys and is transposed, (H, C, U), as the absorbed query needs it; half 1 makes values, (H, v, C).
    """
    weight_OC = read()
    up_k_HUC, up_v_HvC = _up_projections(weight_OC / _latent_scales(weight_OC, config), config)
    return up_v_HvC if half else up_k_HUC.transpose(1, 2)


def _up_projections(weight_OC: Tensor, config: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Returns what makes keys, (H, U, C), and what makes values, (H, v, C)."""
    up_HOC = weight_OC.unflatten(0, (config["num_attention_heads"], -1))
    up_k_HUC, up_v_HvC = up_HOC.split([config["qk_nope_head_dim"], config["v_head_dim"]], dim=1)
    return up_k_HUC, up_v_HvC


def _latent_scales(weight_OC: Tensor, config: dict[str, Any]) -> Tensor:
    """Returns a power of two (C,) for each channel of the latent: about its column's size in the value weights.

    The norm of the latent takes it as a factor and `kv_b_proj` is divided by it, which changes no product. Packed types
    round 32 or 256 neighbours of a row in steps of the largest. A conversion can leave one channel that is large, in
    columns that are small: they would be lost among the others.
    """
    size_C = _up_projections(weight_OC, config)[1].flatten(0, 1).norm(dim=0)
    if not (size_C > 0).any():
        return torch.ones_like(size_C)
    relative_C = size_C / size_C[size_C > 0].median()
    return torch.where(size_C > 0, relative_C.clamp(2.0**-8, 2.0**8).log2().round().exp2(), 1.0)


def _scaled_queries(read: Callable[[], Tensor], config: dict[str, Any]) -> Tensor:
    """Returns a query projection times the factors of YaRN's attention scale that no GGUF key can hold."""
    scales, nope = query_scales(config), config["qk_nope_head_dim"]
    weight_HQA = read().unflatten(0, (config["num_attention_heads"], -1)).clone()
    weight_HQA[:, :nope] *= scales.unrotated
    weight_HQA[:, nope:] *= scales.rotated
    return weight_HQA.flatten(0, 1)

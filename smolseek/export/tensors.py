"""The tensors of a DeepSeek-V3 folder as a GGUF file of architecture deepseek2 holds them, read one at a time.

Shapes: D hidden, H heads, N qk_nope_head_dim, R qk_rope_head_dim, V v_head_dim, C kv_lora_rank, E routed experts,
I moe_intermediate_size; ggml lists dimensions in the reverse order.
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
    """A tensor of the GGUF file: its name there, its shape, and how to read it in fp32."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def keeps_fp32(self) -> bool:
        """Norms, the balancing bias and the router: small, and llama.cpp computes with them in fp32."""
        return len(self.shape) == 1 or "ffn_gate_inp." in self.name


def export_tensors(tensors: TensorFolder, config: dict[str, Any]) -> Iterator[ExportTensor]:
    """All tensors of the GGUF file, experts stacked and `kv_b_proj` split in two; `config` has its defaults filled in,
    and the tensors fit it (`runtimes.check`)."""
    names = get_tensor_name_map(MODEL_ARCH.DEEPSEEK2, config["num_hidden_layers"])
    for name, shape in expected_tensors(config).items():
        for part in _parts(tensors, config, name, shape):
            known = part.name.replace("e_score_correction_bias", "e_score_correction.bias")
            gguf_name = names.get_name(known, (".weight", ".bias"))
            assert gguf_name is not None, known
            yield dataclasses.replace(part, name=gguf_name)


def _parts(tensors: TensorFolder, config: dict[str, Any], name: str, shape: tuple[int, ...]) -> Iterator[ExportTensor]:
    """What one tensor of the folder becomes, not yet renamed: itself, two halves, or a stack at its first expert."""
    prefix, _, kind = name.removesuffix(".weight").rpartition(".")
    read = partial(_read, tensors, name)
    heads, nope, value = (config[field] for field in ("num_attention_heads", "qk_nope_head_dim", "v_head_dim"))
    if ".mlp.experts." in name:
        experts, _, number = prefix.rpartition(".")
        if number == "0":
            stack = partial(_stack, tensors, config, experts, kind)
            yield ExportTensor(f"{experts}.{kind}.weight", (config["n_routed_experts"], *shape), stack)
    elif kind == "kv_b_proj":
        yield ExportTensor(f"{prefix}.k_b_proj.weight", (heads, shape[1], nope), partial(_split, read, config, 0))
        yield ExportTensor(f"{prefix}.v_b_proj.weight", (heads, value, shape[1]), partial(_split, read, config, 1))
    elif kind in ("q_proj", "q_b_proj"):
        yield ExportTensor(name, shape, partial(_scaled_queries, read, config))
    else:
        yield ExportTensor(name, shape, read)


def _read(tensors: TensorFolder, name: str) -> Tensor:
    """One tensor in fp32."""
    tensor = tensors.get(name).float()
    if not torch.isfinite(tensor).all():
        raise ValueError(f"tensor {name}: holds NaN or infinity; fetch the checkpoint again or name another")
    return tensor


def _stack(tensors: TensorFolder, config: dict[str, Any], experts: str, part: str) -> Tensor:
    """One projection of all routed experts of a layer: (E, I, D) or (E, D, I)."""
    return torch.stack([_read(tensors, f"{experts}.{i}.{part}.weight") for i in range(config["n_routed_experts"])])


def _split(read: Callable[[], Tensor], config: dict[str, Any], half: int) -> Tensor:
    """Half of `kv_b_proj`: the key's, transposed as the absorbed query needs it (H, C, N), or the value's (H, V, C)."""
    up_HXC = read().unflatten(0, (config["num_attention_heads"], -1))
    up_k_HNC, up_v_HVC = up_HXC.split([config["qk_nope_head_dim"], config["v_head_dim"]], dim=1)
    return up_v_HVC if half else up_k_HNC.transpose(1, 2)


def _scaled_queries(read: Callable[[], Tensor], config: dict[str, Any]) -> Tensor:
    """Query rows, with what of YaRN's attention scale no key can say."""
    scales, nope = query_scales(config), config["qk_nope_head_dim"]
    rows_HQX = read().unflatten(0, (config["num_attention_heads"], -1)).clone()
    rows_HQX[:, :nope] *= scales.unrotated
    rows_HQX[:, nope:] *= scales.rotated
    return rows_HQX.flatten(0, 1)

"""The dtype in which a model computes, by the recipe's `precision` and the hardware."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor


def autocast(device: torch.device, precision: str) -> Any:
    """Returns bf16 autocast if `precision` asks for it, or is auto and the hardware multiplies bf16 itself."""
    dtype = teacher_dtype(device, precision)
    return torch.autocast(device.type, dtype=dtype) if dtype == torch.bfloat16 else contextlib.nullcontext()


def teacher_dtype(device: torch.device, precision: str) -> torch.dtype:
    """Returns the dtype for the weights of a model that is not trained: that of the computation.

    Trained weights stay in fp32, because small updates would be lost in bf16; these weights get no updates.
    """
    use = precision == "bfloat16" or (precision == "auto" and has_bfloat16(device))
    return torch.bfloat16 if use else torch.float32


def has_bfloat16(device: torch.device) -> bool:
    """Returns whether the device has bf16 matrix units (emulated bf16 is slower than fp32)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    return False


def autocast_dtype(x: Tensor) -> torch.dtype:
    """Returns autocast's dtype if it is on, else the tensor's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype

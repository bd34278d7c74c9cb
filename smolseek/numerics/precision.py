"""In which dtype and on which device to compute, by the recipe's `precision` and the hardware."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

_FLOAT64_CAPABILITIES = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}
"""CUDA compute capabilities with full float64: P100, V100, A100, H100 and H200, B200."""


def autocast(device: torch.device, precision: str) -> Any:
    """Returns bf16 autocast if `precision` asks for it, or is auto and the hardware multiplies bf16 itself.

    It keeps no bf16 copy of a weight, which a forward pass needs once: a layer with activation checkpointing can drop
    its copies, and no process then holds all that several have divided.
    """
    dtype = compute_dtype(device, precision)
    if dtype != torch.bfloat16:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype, cache_enabled=False)


def compute_dtype(device: torch.device, precision: str) -> torch.dtype:
    """Returns the dtype of matrix products, in which a model that is not trained can also keep its weights.

    Trained weights stay in fp32, because bf16 would lose small updates.
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


def has_float64(device: torch.device) -> bool:
    """Returns whether the device computes in float64 at all."""
    return device.type != "mps"


def algebra_device(device: torch.device) -> torch.device:
    """Returns where float64 decompositions run: on the device itself if it is good at them, else on the CPU.

    Data-centre GPUs have a float64 unit for every second float32 one; other GPUs have one for every 32nd or 64th.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) in _FLOAT64_CAPABILITIES:
        return device
    return torch.device("cpu")


def check_device(device: str) -> None:
    """Raises ValueError if this machine does not have the device (cpu, cuda or mps, with or without a number)."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(device.partition(":")[0]):
        raise ValueError(f"device {device}: not available here; use {', '.join(d for d in there if there[d])}")

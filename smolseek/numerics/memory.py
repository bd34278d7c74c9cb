"""Settings of the C library's memory allocator for this process, and copies from its memory to a GPU's."""

from __future__ import annotations

import contextlib
import ctypes

import torch
from torch import Tensor

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""Parameters of glibc's mallopt."""


def keep_freed_memory() -> None:
    """Let this process keep the memory that a step frees, so that the next step can use it. Without glibc: no effect.

    By default, tensors of 32 MiB and more go back to the system at once. On a CPU, getting new pages costs more than
    writing them: a fifth of the loss's time at 49,152 vocabulary entries.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        library = ctypes.CDLL(None)
        library.mallopt(_MMAP_MAX, 0)
        library.mallopt(_TRIM_THRESHOLD, -1)


def release_memory() -> None:
    """Give the freed memory that glibc has kept back to the system: after one window, half the size of the weights."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns the tensor on a device; the CPU does not wait until CUDA has it, for CUDA keeps a copy of its own."""
    return tensor.to(device, non_blocking=device.type == "cuda")

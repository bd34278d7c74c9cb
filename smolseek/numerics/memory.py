"""What this process asks of the C library's memory allocator."""

from __future__ import annotations

import contextlib
import ctypes

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""Parameters of glibc's mallopt."""


def keep_freed_memory() -> None:
    """Let this process keep the memory that a step frees, for the next step to use; glibc only, else nothing.

    Otherwise tensors of 32 MiB and more go back to the system at once, and taking pages from it anew costs a CPU more
    than writing them: a fifth of the loss's time at 49,152 vocabulary entries.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        library = ctypes.CDLL(None)
        library.mallopt(_MMAP_MAX, 0)
        library.mallopt(_TRIM_THRESHOLD, -1)


def release_memory() -> None:
    """Give freed memory back to the system, which glibc keeps for later: half a model's weights after one window."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)

"""How fast a device multiplies matrices and reads memory; torch is imported only for GPUs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Machine:
    """What a device does at best: matrix products (of a GPU in the dtype that it trains in), and reading weights."""

    flops_per_second: float
    bytes_per_second: float
    float64_share: float = 0.5
    """Rate of float64 products, over that of the others."""
    device: str = "cpu"


def measure_machine(device: str = "cpu", seconds: float = 0.4) -> Machine:
    """Returns a device's matrix-product rates and the rate at which it reads memory.

    On the CPU these are fp32 products and matrix-vector products, the best of what fits in `seconds`. Products small
    enough for one thread of the BLAS take turns with ones that use all threads: those wait for each other, so other
    work on the machine can spoil the second kind a hundredfold.
    """
    if device != "cpu":
        return _measure_accelerator(device)
    squares = [np.ones((side, side), np.float32) for side in (*[64] * 20, 384)]
    weights = np.ones((4096, 64, 64), np.float32)
    readings = [(weights, np.ones(64, np.float32)), (weights.reshape(8192, 2048), np.ones(2048, np.float32))]
    flops = read = 0.0
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        flops = max(flops, *(2 * len(square) ** 3 / _seconds(np.matmul, square, square) for square in squares))
        read = max(read, *(weights.nbytes / _seconds(np.matmul, *reading) for reading in readings))
    return Machine(flops_per_second=flops, bytes_per_second=read)


def _measure_accelerator(device: str) -> Machine:
    """Returns the rates of a GPU: products in the dtype that it trains in, a copy of memory, float64 products."""
    import torch

    from smolseek.numerics.precision import check_device, compute_dtype, has_float64

    check_device(device)
    place = torch.device(device)

    def best_seconds(work: Callable[[], object], runs: int = 5) -> float:
        times = []
        for _ in range(runs):
            torch.accelerator.synchronize()
            start = time.perf_counter()
            work()
            torch.accelerator.synchronize()
            times.append(time.perf_counter() - start)
        return min(times)

    def product_rate(dtype: torch.dtype, side: int) -> float:
        square = torch.ones(side, side, dtype=dtype, device=place)
        return 2 * side**3 / best_seconds(lambda: square @ square)

    numbers = torch.ones(2**26, device=place)
    flops = product_rate(compute_dtype(place, "auto"), 4096)
    float64 = product_rate(torch.float64, 2048) if has_float64(place) else measure_machine().flops_per_second / 2
    return Machine(flops, 2 * numbers.nbytes / best_seconds(numbers.clone), float64 / flops, device)


def _seconds(function: Callable[..., object], *arguments: object) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start

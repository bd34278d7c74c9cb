"""How fast a device multiplies matrices and reads memory; torch is imported only for GPUs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_CPU_FACTS = Path("/proc/cpuinfo")
_CPU_TIMES = Path("/proc/stat")


@dataclass(frozen=True)
class Machine:
    """What a device does at best: matrix products in the dtype that it trains in, and reading weights."""

    flops_per_second: float
    bytes_per_second: float
    float64_share: float = 0.5
    """Rate of float64 products, over that of the others."""
    device: str = "cpu"
    bfloat16: bool = False
    """Whether it has units for bf16, in which it then trains."""
    others: float = 0.0
    """Share of the processors that other programs took while a CPU was measured."""


def measure_machine(device: str = "cpu", seconds: float = 0.4) -> Machine:
    """Returns a device's matrix-product rates and the rate at which it reads memory.

    On the CPU these are fp32 products, counted twice where the processor multiplies bf16 (its units for that do 2.1 to
    2.4 times the fp32 rate, and AMX more), and matrix-vector products, the best of what fits in `seconds`. Products
    small enough for one thread of the BLAS take turns with ones that use all threads: those wait for each other, so
    other work on the machine can spoil the second kind a hundredfold.
    """
    if device != "cpu":
        return _measure_accelerator(device)
    squares = [np.ones((side, side), np.float32) for side in (*[64] * 20, 384)]
    weights = np.ones((4096, 64, 64), np.float32)
    readings = [(weights, np.ones(64, np.float32)), (weights.reshape(8192, 2048), np.ones(2048, np.float32))]
    flops = read = 0.0
    begin, own, all_busy = time.perf_counter(), time.process_time(), _busy_seconds()
    while time.perf_counter() < begin + seconds:
        flops = max(flops, *(2 * len(square) ** 3 / _seconds(np.matmul, square, square) for square in squares))
        read = max(read, *(weights.nbytes / _seconds(np.matmul, *reading) for reading in readings))
    taken, passed = time.process_time() - own, time.perf_counter() - begin
    others = (_busy_seconds() - all_busy - taken) / (passed * (os.cpu_count() or 1))
    bfloat16 = _multiplies_bfloat16()
    gain = 2.0 if bfloat16 else 1.0
    return Machine(
        flops_per_second=gain * flops,
        bytes_per_second=read,
        float64_share=0.5 / gain,
        bfloat16=bfloat16,
        others=min(1.0, max(0.0, others)),
    )


def _busy_seconds() -> float:
    """Returns the processor seconds that all programs have taken since the start; 0 where no /proc says so."""
    if not _CPU_TIMES.is_file():
        return 0.0
    user, nice, system, _, _, *interrupts = map(int, _CPU_TIMES.read_text(encoding="utf-8").split("\n")[0].split()[1:9])
    return float(user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


def _multiplies_bfloat16() -> bool:
    """Returns whether the CPU has units for bf16, asked without torch; False where no /proc says so."""
    if not _CPU_FACTS.is_file():
        return False
    return bool({"avx512_bf16", "amx_bf16"} & set(_CPU_FACTS.read_text(encoding="utf-8").split()))


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
    dtype = compute_dtype(place, "auto")
    flops = product_rate(dtype, 4096)
    cpu = measure_machine()
    on_cpu = cpu.flops_per_second * cpu.float64_share
    float64 = product_rate(torch.float64, 2048) if has_float64(place) else on_cpu
    reading = 2 * numbers.nbytes / best_seconds(numbers.clone)
    return Machine(flops, reading, float64 / flops, device, bfloat16=dtype == torch.bfloat16)


def _seconds(function: Callable[..., object], *arguments: object) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start

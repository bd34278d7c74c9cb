"""Several processes that torch.distributed joins, on this machine."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
JOIN = """
import json, sys, time
from datetime import timedelta
from torch.distributed.distributed_c10d import _set_pg_timeout
from smolseek.config import ParallelSettings
from smolseek.numerics import precision
from smolseek.training.processes import join_processes
precision.has_bfloat16 = lambda device: False
with join_processes(ParallelSettings(), "cpu") as (processes, device):
    shares = processes.shares
    _set_pg_timeout(timedelta(seconds=TIMEOUT))
"""
"""Code of one process, whose products are in fp32: what follows is indented and has its `shares`.

A step that all take together may last `TIMEOUT` seconds.
"""


def run_together(count: int, *arguments: str) -> list[tuple[int, str, str]]:
    """Run Python with these arguments in `count` processes, as torchrun would; returns each one's status and output."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    shared = os.environ | {"PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, *arguments],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        outputs = [process.communicate(timeout=1000) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]

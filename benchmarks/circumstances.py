"""The command, machine and versions of a measurement, as every report states them."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch


def command_line() -> str:
    """Returns the command line of this process, from the repository's root."""
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def circumstances() -> str:
    """Returns machine, threads, versions and commit in one sentence."""
    git = subprocess.run(
        ["git", "log", "-1", "--format=%h (%s)"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    machine = f"{os.cpu_count()} {platform.machine()} cores ({torch.backends.cpu.get_cpu_capability()})"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    return (
        f"On {machine}, {torch.get_num_threads()} threads; {versions}, Python {platform.python_version()}; "
        f"after commit {git.stdout.strip() or 'unknown'}."
    )

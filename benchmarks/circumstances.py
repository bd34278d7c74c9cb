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
    """Returns the command line of this process, from the repository's root; see `without_folders`."""
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *map(without_folders, sys.argv[1:])])


def without_folders(argument: str) -> str:
    """Returns an argument, PATH or NAME=PATH, an absolute path cut to its name: reports tell no machine's paths."""
    name, equals, path = argument.rpartition("=")
    return f"{name}{equals}{Path(path).name}" if path.startswith("/") else argument


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

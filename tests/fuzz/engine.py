"""Runs the command line on damaged files, in this process, and says what is wrong with how it ended.

A case ends well with success or with one clear line and status 2, in bounded time and memory, and with all files as
they were but those that the command may write.
"""

import hashlib
import io
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, chdir, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Protocol
from unittest.mock import patch

from smolseek.cli import main
from smolseek.machine import measure_machine

MOST_SECONDS = 60
MOST_BYTES = 2 << 30
"""By which the process may grow; beyond it an allocation fails."""
LONGEST_LINE = 1000
RAW = re.compile(
    r"smolseek: ('?utf|\w*Error|'\w+' object|unsupported|not enough|expected|could not|\[Errno|cannot|invalid)"
)
"""Beginnings of what Python and the libraries say, which name neither the file nor the field."""
CACHE = "work/cache"
"""Where a case unpacks GGUF files."""
OWN = ("work/out", "work/.out", "work/new", "work/runs/stopped", CACHE)
"""Beginnings of the paths that a command may write to."""


class TookTooLong(BaseException):
    """A call did not end within MOST_SECONDS."""


@dataclass(frozen=True)
class Outcome:
    """How a call ended; `error` is the traceback of what it raised, the frames of this module left out."""

    status: int | None
    stdout: str
    stderr: str
    error: str
    seconds: float
    growth: int
    """Bytes by which the largest memory of the process grew."""

    @property
    def refusal(self) -> str:
        """The line that says why, empty after a success."""
        return next((line for line in self.stderr.splitlines() if line.startswith("smolseek:")), "")

    def fault(self, verb: str) -> str:
        """Returns what is wrong with the end of a call, empty if nothing is."""
        lines = [line for line in self.stderr.splitlines() if line.startswith("smolseek:")]
        if self.error or "Traceback" in self.stdout + self.stderr:
            return f"raised: {self.error or self.stderr}"
        if self.status not in ((0, 1, 2) if verb == "check" else (0, 2)):
            return f"status {self.status}"
        if len(lines) != (self.status == 2):
            return f"status {self.status} and {len(lines)} lines that begin with smolseek: {lines}"
        if lines and RAW.match(lines[0]):
            return f"a line that names no input: {lines[0]}"
        if lines and not 20 < len(lines[0]) < LONGEST_LINE:
            return f"a line of {len(lines[0]):,} characters: {lines[0][:200]}"
        return "" if self.seconds < MOST_SECONDS else f"{self.seconds:.0f} seconds"


class Change(Protocol):
    """Damage to the files in a folder; its repr makes it again."""

    def apply(self, root: Path) -> None: ...


def call(arguments: Sequence[str], stdin: bytes = b"") -> Outcome:
    """Runs one command line in this process and in the present folder, without the network."""
    out, err = (
        io.TextIOWrapper(io.BytesIO(), "utf-8", how, write_through=True) for how in ("strict", "backslashreplace")
    )
    before, begin = _largest_memory(), time.perf_counter()
    status, error = None, ""
    with ExitStack() as stack:
        for block in (redirect_stdout(out), redirect_stderr(err), _quickly(), _bounded()):
            stack.enter_context(block)
        stack.enter_context(patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), "utf-8")))
        try:
            status = main(list(arguments))
        except KeyboardInterrupt:
            raise
        except BaseException:  # noqa: BLE001  (whatever it is, a user would see it)
            error = traceback.format_exc()
    seconds = time.perf_counter() - begin
    said, complained = (stream.buffer.getvalue().decode() for stream in (out, err))
    return Outcome(status, said, complained, error, seconds, _largest_memory() - before)


def examine(sound: Path, command: Sequence[str], changes: Sequence[Change], stdin: bytes = b"") -> tuple[Outcome, str]:
    """Runs a command on a copy of `sound` with changes; returns how it ended and what is wrong with it, if anything."""
    with tempfile.TemporaryDirectory(prefix="smolseek-case-") as folder:
        root = Path(folder) / "case"
        needs_runs = any("work/runs" in argument for argument in command)
        shutil.copytree(sound, root, ignore=None if needs_runs else shutil.ignore_patterns("runs"))
        for change in changes:
            with suppress(OSError, ValueError):  # an earlier change took away what this one would damage
                change.apply(root)
        before = _digests(root)
        with chdir(root):
            outcome = call(command, stdin)
        changed = sorted(path for path, _ in before.items() ^ _digests(root).items() if not path.startswith(OWN))
        fault = outcome.fault(command[0])
        if not fault and changed:
            fault = f"changed {', '.join(changed)}"
        if not fault and outcome.status == 2 and (half := [*root.glob("work/out*")]):
            fault = f"refused, and left {half[0].name}"
        return outcome, fault


def _digests(root: Path) -> dict[str, str]:
    """Returns a digest of each file in the folder and of those beside it, by path."""
    paths = [path for path in root.parent.rglob("*") if path.name != ".lock"]
    content = {path: path.read_bytes() if path.is_file() else b"" for path in paths}
    return {os.path.relpath(path, root): hashlib.sha256(content[path]).hexdigest() for path in paths}


def _largest_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextmanager
def _quickly() -> Iterator[None]:
    """Without the network and without waiting for the disk; the machine is measured once. GGUF files are unpacked into
    CACHE."""
    import datasets.config
    import huggingface_hub.constants

    with (
        patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", True),
        patch.object(huggingface_hub.constants, "HF_ASSETS_CACHE", CACHE),
        patch.object(datasets.config, "HF_HUB_OFFLINE", True),
        patch.object(os, "fsync", lambda _: None),
        patch("smolseek.machine.measure_machine", _measured),
    ):
        yield


_measured = cache(measure_machine)


@contextmanager
def _bounded() -> Iterator[None]:
    """Raises TookTooLong in the block after MOST_SECONDS, and lets allocations beyond MOST_BYTES fail (Linux)."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise TookTooLong

    limits = resource.getrlimit(resource.RLIMIT_AS)
    statm = Path("/proc/self/statm")
    if statm.is_file():
        size = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MOST_BYTES, limits[1]))
    handler, left = signal.signal(signal.SIGALRM, stop), signal.setitimer(signal.ITIMER_REAL, MOST_SECONDS)[0]
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, limits)

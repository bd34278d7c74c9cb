"""Folders and files that are complete or absent: written under another name, synced, then renamed."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_folder(out: Path, *, force: bool = False) -> Iterator[Path]:
    """Yields a new folder to write into; it becomes `out` when the block succeeds, and is removed when it fails.

    Raises:
        ValueError: `out` exists and `force` is not set.
    """
    out = Path(out)
    refuse_existing(out, force)
    out.parent.mkdir(parents=True, exist_ok=True)
    token = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
    partial, old = out.parent / f".{out.name}.partial-{token}", out.parent / f".{out.name}.old-{token}"
    partial.mkdir()
    try:
        yield partial
        for path in [*partial.rglob("*"), partial]:
            _sync(path)
        refuse_existing(out, force)
        if out.exists():
            out.rename(old)
        partial.rename(out)
        _sync(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def atomic_file(out: Path, *, force: bool = False) -> Iterator[Path]:
    """Yields a path to write to; the file becomes `out` when the block succeeds, and is removed when it fails.

    Raises:
        ValueError: `out` exists and `force` is not set, or is a folder.
    """
    refuse_existing(out, force)
    if out.is_dir():
        raise ValueError(f"{out}: is a folder; name a file")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.parent / f".{out.name}.partial-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    try:
        yield partial
        _sync(partial)
        refuse_existing(out, force)
        os.replace(partial, out)
        _sync(out.parent)
    finally:
        partial.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Removes the unfinished files and folders of killed writers in `folder`; no writer may be at work there."""
    for pattern in (".*.partial-*", ".*.old-*"):
        for leftover in folder.glob(pattern):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)


def refuse_existing(out: Path, force: bool) -> None:
    """Raises ValueError if `out` exists and may not be replaced."""
    if out.exists() and not force:
        raise ValueError(f"{out}: exists already; pass --force to replace it, or name another")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Folders and files that are complete or absent: written under another name, synced, then renamed.

What may be replaced or removed, and who may write, is checked here too.
"""

from __future__ import annotations

import glob
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

LOCK = ".lock"
"""Name of the file in a folder that `exclusive` locks."""


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
            sync(path)
        refuse_existing(out, force)
        if out.exists():
            out.rename(old)
        partial.rename(out)
        sync(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        _put_back_or_remove(old, out)


@contextmanager
def atomic_file(out: Path, *, force: bool = False) -> Iterator[Path]:
    """Yields a path to write to; the file becomes `out` when the block succeeds, and is removed when it fails.

    Raises:
        ValueError: `out` exists and `force` is not set, or is a folder.
    """
    if out.is_dir():
        raise ValueError(f"{out}: is a folder; name a file")
    refuse_existing(out, force)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.parent / f".{out.name}.partial-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    try:
        yield partial
        sync(partial)
        refuse_existing(out, force)
        os.replace(partial, out)
        sync(out.parent)
    finally:
        partial.unlink(missing_ok=True)


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Removes the unfinished files and folders of killed writers in `folder`, of all names or of one.

    A folder that was being replaced, and whose successor is not there, comes back. What a living process of this
    machine writes stays.
    """
    pattern = "*" if name is None else glob.escape(name)
    for old in folder.glob(f".{pattern}.old-*"):
        if _is_dead(old):
            _put_back_or_remove(old, folder / old.name[1:].rpartition(".old-")[0])
    for partial in folder.glob(f".{pattern}.partial-*"):
        if not _is_dead(partial):
            continue
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def _put_back_or_remove(old: Path, out: Path) -> None:
    """Ends the replacement of a folder: the old one comes back if there is no new one."""
    if old.exists() and not out.exists():
        old.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def _is_dead(path: Path) -> bool:
    """Returns whether the process that a leftover's name tells is gone, from this machine at least."""
    number = path.name.rpartition("-")[0].rpartition("-")[2]
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except (OverflowError, PermissionError, ValueError):
        return False
    return int(number) == os.getpid()


def refuse_existing(out: Path, force: bool) -> None:
    """Raises ValueError if `out` exists and may not be replaced."""
    if out.exists() and not force:
        raise ValueError(f"{out}: exists already; pass --force to replace it, or name another")


def refuse_other_file(out: Path, beginning: bytes) -> None:
    """Raises ValueError if `out` is there and is no file that begins so: --force replaces its own kind only."""
    if out.exists() and not begins_with(out, beginning):
        raise ValueError(
            f"{out}: is no {out.suffix.lstrip('.')} file that smolseek wrote, and stays; name another file"
        )


def begins_with(path: Path, beginning: bytes) -> bool:
    """Returns whether a path is a file that begins with these bytes, whatever their case."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(beginning)).lower() == beginning.lower()


def refuse_inputs(out: Path, inputs: Iterable[str | Path]) -> None:
    """Raises ValueError if one of `inputs` (files, folders, globs; other names are passed over) is or lies in `out`."""
    place = out.resolve()
    for given in inputs:
        for path in [*glob.glob(str(given), recursive=True), str(given)]:
            if Path(path).exists() and (place == Path(path).resolve() or place in Path(path).resolve().parents):
                raise ValueError(f"{out}: holds {given}, which is read here and would be removed; name another")


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Makes the folder, and keeps other processes from entering this block; the lock ends with the process.

    Raises:
        ValueError: another process is in the block.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(f"{folder}: another process is at work in it; wait for its end, or name another") from error
    try:
        yield
    finally:
        lock.release()


def sync(path: Path) -> None:
    """Returns when a file or folder is on disk, so that a power cut leaves it whole."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_space(folder: Path, needed_bytes: int, remedy: str) -> None:
    """Raises ValueError, which ends with `remedy`, if a folder's disk has less room than that."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise ValueError(f"{folder}: {_told(free_bytes)} free, and {_told(needed_bytes)} are needed there {remedy}")


def _told(size_bytes: int) -> str:
    """Returns a size in GB, or in MB where it is below 0.1 GB."""
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 1e8 else f"{size_bytes / 1e6:.1f} MB"

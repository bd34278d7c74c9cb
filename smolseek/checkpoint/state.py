"""Training states on disk (safetensors and JSON): complete or absent, with checksums; the last few are kept."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from smolseek.checkpoint.atomic import atomic_folder

log = logging.getLogger(__name__)

CHECKSUMS = "checksums.json"


@contextmanager
def new_state(checkpoints: Path, step: int, *, keep_last: int) -> Iterator[Path]:
    """Yields a folder to write a state into; it becomes `checkpoints/step-N`, with checksums, when the block succeeds.

    Then removes everything else in `checkpoints` but the `keep_last` newest states up to N: older and later states, and
    the remains of killed writers.

    Raises:
        OSError: the state cannot be written (because the disk is full, for example); earlier states stay as they are.
    """
    out = checkpoints / f"step-{step:08d}"
    try:
        with atomic_folder(out, force=True) as folder:
            yield folder
            sums = {str(path.relative_to(folder)): _checksum(path) for path in _files(folder)}
            (folder / CHECKSUMS).write_text(json.dumps(sums), encoding="utf-8")
    except (OSError, SafetensorError) as error:
        whole = max((path for path in _states(checkpoints) if find_damage(path) is None), default=None)
        kept = f"{whole.name} is kept" if whole else "there is none before it"
        raise OSError(
            f"{out}: cannot write the training state ({error}); {kept}: free some space and go on with --resume"
        ) from error
    kept_states = sorted(path for path in _states(checkpoints) if path <= out)[-keep_last:]
    for path in checkpoints.iterdir():
        if path not in kept_states:
            _remove(path)


def save_state(
    checkpoints: Path, step: int, plain: dict[str, Any], tensors: dict[str, Tensor], *, keep_last: int = 2
) -> Path:
    """Writes `checkpoints/step-N`; raises errors and removes old states as `new_state` does."""
    with new_state(checkpoints, step, keep_last=keep_last) as folder:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, folder / "tensors")
        (folder / "state.json").write_text(json.dumps(plain), encoding="utf-8")
    return checkpoints / f"step-{step:08d}"


def newest_state(checkpoints: Path) -> Path | None:
    """Returns the newest complete state, damaged or not; None if there is no state."""
    return max(_states(checkpoints), default=None)


def newest_whole_state(checkpoints: Path) -> Path | None:
    """Returns the newest state whose files match their checksums; warns of damaged newer ones. None without states.

    Raises:
        ValueError: there are states, and all of them are damaged.
    """
    states = sorted(_states(checkpoints), reverse=True)
    passed_over: list[str] = []
    for folder in states:
        damage = find_damage(folder)
        if damage is None:
            if passed_over:
                log.warning("%s: going on from it, because of a damaged %s", folder, " and ".join(passed_over))
            return folder
        passed_over.append(f"{folder.name} ({damage})")
    if states:
        raise ValueError(f"{checkpoints}: damaged training state {', '.join(passed_over)}; start over with --force")
    return None


def find_damage(folder: Path) -> str | None:
    """Returns in a few words which of a state's files do not match their checksums; None if all do."""
    try:
        sums = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        bad = [name for name, wanted in sums.items() if _checksum(folder / name) != wanted]
    except (AttributeError, OSError, RecursionError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return f"{', '.join(bad)}: not what was written" if bad else None


def load_state(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the two parts that `save_state` wrote.

    Raises:
        ValueError: the files are damaged.
    """
    try:
        return load_plain(folder), load_file(folder / "tensors")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder}: damaged training state ({error}); start over with --force") from error


def load_plain(folder: Path) -> dict[str, Any]:
    """Returns the JSON part of a state.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        return json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (OSError, RecursionError, ValueError) as error:
        raise ValueError(f"{folder}: damaged training state ({error}); start over with --force") from error


def _states(checkpoints: Path) -> list[Path]:
    return list(checkpoints.glob("step-*"))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove(path: Path) -> None:
    """Deletes a folder; renames it to a hidden name first, so that a kill cannot leave half a state."""
    hidden = path if path.name.startswith(".") else path.rename(path.with_name(f".{path.name}.old"))
    shutil.rmtree(hidden, ignore_errors=True)

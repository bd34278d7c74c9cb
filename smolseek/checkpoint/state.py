"""Training state on disk: safetensors for tensors, JSON for the rest; complete or absent."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from smolseek.checkpoint.atomic import atomic_folder


def save_state(checkpoints: Path, step: int, plain: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    """Write `checkpoints/step-N` and then remove the older ones."""
    out = checkpoints / f"step-{step:08d}"
    with atomic_folder(out, force=True) as folder:
        try:
            save_file(
                {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, folder / "tensors"
            )
        except SafetensorError as error:
            raise OSError(f"{checkpoints}: cannot write the training state ({error})") from error
        (folder / "state.json").write_text(json.dumps(plain), encoding="utf-8")
    for older in checkpoints.iterdir():
        if older != out:
            shutil.rmtree(older, ignore_errors=True)
    return out


def latest_state(checkpoints: Path) -> Path | None:
    """The newest complete state, if any."""
    return max(checkpoints.glob("step-*"), default=None)


def load_state(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `save_state` wrote.

    Raises:
        ValueError: the files are damaged.
    """
    try:
        return json.loads((folder / "state.json").read_text(encoding="utf-8")), load_file(folder / "tensors")
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder}: damaged training state ({error}); start over with --force") from error

"""Sharded training states: the tensors that several processes wrote, by `torch.distributed.checkpoint`.

They lie in a folder of the state that `smolseek.checkpoint.state` describes, and any number of processes can read them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from smolseek.numerics.shards import own_part

SHARDS = "sharded"
"""Folder in a training state that holds its tensors."""


def has_shards(state: Path) -> bool:
    """Returns whether several processes wrote this training state."""
    return (state / SHARDS).is_dir()


def write_shards(state: Path, tensors: dict[str, Tensor]) -> None:
    """Write this process's shards into a training state; every process must call it.

    Raises:
        OSError: a process cannot write.
    """
    import torch.distributed.checkpoint as dcp

    try:
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(state / SHARDS))
    except dcp.api.CheckpointException as error:
        rank, failure = next(iter(error.failures.items()))
        raise OSError(f"process {rank}: {failure[0]}") from error


def read_shards(state: Path, live: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Returns every tensor of a sharded training state.

    Without `live` this process reads alone, and all tensors are whole. With it every process must call this function,
    and a tensor that has a `live_tensor` is sharded as that one is.

    Raises:
        ValueError: the files are damaged.
    """
    import torch.distributed.checkpoint as dcp

    alone, folder = live is None, state / SHARDS
    try:
        saved = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
        tensors: dict[str, Any] = {}
        for name, entry in saved.items():
            assert isinstance(entry, dcp.metadata.TensorStorageMetadata)  # everything else is in state.json
            like = live_tensor(name, entry.size, live or {})
            dtype = entry.properties.dtype
            tensors[name] = torch.empty(entry.size, dtype=dtype)
            if like is not None:
                tensors[name] = torch.zeros_like(like.detach(), dtype=dtype)
        dcp.load(tensors, storage_reader=dcp.FileSystemReader(folder), no_dist=alone)
    except (OSError, dcp.api.CheckpointException) as error:
        raise ValueError(f"{state}: damaged training state ({error}); start over with --force") from error
    return tensors


def read_parts(state: Path, live: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns every tensor of a training state that a single process wrote.

    One whose `live_tensor` is divided is divided as that one is, and each process reads its part alone.

    Raises:
        ValueError: the files are damaged.
    """
    try:
        with safe_open(state / "tensors", framework="pt") as file:
            return {name: _read_part(file, name, live) for name in file.keys()}  # noqa: SIM118  (no mapping)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{state}: damaged training state ({error}); start over with --force") from error


def _read_part(file: Any, name: str, live: Mapping[str, Tensor]) -> Tensor:
    from torch.distributed.tensor import DTensor

    stored = file.get_slice(name)
    shape = torch.Size(stored.get_shape())
    like = live_tensor(name, shape, live)
    if not isinstance(like, DTensor):
        return file.get_tensor(name)
    _, bounds = own_part(like)
    part = stored[bounds].to(like.device)
    return DTensor.from_local(part, like.device_mesh, like.placements, shape=shape, stride=like.stride())


def live_tensor(name: str, shape: torch.Size, live: Mapping[str, Tensor]) -> Tensor | None:
    """Returns the run's own tensor that a saved one belongs to, if that has the same shape.

    It has the saved tensor's name, or that name without its last part: the moments of a parameter belong to it.
    """
    found = live.get(name, live.get(name.rpartition(".")[0]))
    return found if found is not None and found.shape == shape else None

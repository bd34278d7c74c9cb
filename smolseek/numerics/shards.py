"""Tensors and models that several processes divide among them (torch's DTensor and FSDP2), and what is whole alike."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def is_divided(tensor: Tensor) -> bool:
    """Returns whether processes divide a tensor among them."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Any) -> Any:
    """Returns this process's part of a divided tensor, and a whole tensor itself."""
    return tensor.to_local() if is_divided(tensor) else tensor


def own_part(tensor: Any) -> tuple[Tensor, tuple[slice, ...]]:
    """Returns the part of a tensor that lies in this process, and where in the tensor it lies: a slice per dimension.

    Of a whole tensor this is all of it. A divided dimension is cut as `torch.chunk` does.
    """
    bounds = [slice(0, size) for size in tensor.shape]
    if not is_divided(tensor):
        return tensor, tuple(bounds)
    mesh = tensor.device_mesh
    for axis, placement in enumerate(tensor.placements):
        if placement.is_shard():
            cut = bounds[placement.dim]
            size = -(-(cut.stop - cut.start) // mesh.size(axis))
            start = min(cut.start + mesh.get_local_rank(axis) * size, cut.stop)
            bounds[placement.dim] = slice(start, min(start + size, cut.stop))
    part = tensor.to_local()
    assert part.shape == tuple(cut.stop - cut.start for cut in bounds)
    return part, tuple(bounds)


def whole(tensor: Any) -> Tensor:
    """Returns a tensor with all its parts, in every process; all of them must ask for it at the same time."""
    return tensor.full_tensor() if is_divided(tensor) else tensor


def gathers_weights(model: nn.Module) -> bool:
    """Returns whether a model is divided, so that its weights are gathered layer by layer in each forward (FSDP2)."""
    return hasattr(model, "reshard")


def release_gathered(model: nn.Module) -> None:
    """Frees what a divided model gathered for forwards that no backward follows; does nothing for a whole one.

    FSDP2 keeps the weights of the root, and notes of every forward, which newer versions of torch let us drop.
    """
    if gathers_weights(model):
        getattr(model, "reset_iter_state", model.reshard)()  # type: ignore[operator]

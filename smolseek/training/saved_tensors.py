"""The tensors of a training state, by name: `model.NAME`, `optimizer.NUMBER.PARAMETER.KEY`, `data.NAME`, `rng.DEVICE`.

The trainer's `save` and `resume` add the numbers that are no tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def collect_tensors(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], data: dict[str, Tensor], device: torch.device
) -> dict[str, Tensor]:
    """Returns all tensors that `restore_tensors` needs; `data` has those of the window stream."""
    tensors = {f"model.{name}": tensor for name, tensor in _untied_state(model).items()}
    tensors |= {f"data.{name}": tensor for name, tensor in data.items()}
    tensors["rng.cpu"] = torch.get_rng_state()
    if device.type == "cuda":
        tensors["rng.cuda"] = torch.cuda.get_rng_state(device)
    for number, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{index}.{key}": value for key, value in state.items()}
    return tensors


def live_tensors(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Returns the model's tensors and the optimizers' parameters, under the names of the saved tensors they belong to.

    A sharded run reads each saved tensor in the same shards (see `sharded_state.live_tensor`).
    """
    live = {f"model.{name}": tensor for name, tensor in _untied_state(model).items()}
    for number, optimizer in enumerate(optimizers):
        parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
        live |= {f"optimizer.{number}.{index}": parameter for index, parameter in enumerate(parameters)}
    return live


def restore_tensors(
    tensors: dict[str, Tensor],
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    device: torch.device,
) -> None:
    """Put saved tensors back into the model, the optimizers and the random generators."""
    weights = _part(tensors, "model.")
    with torch.no_grad():
        for name, target in _untied_state(model).items():
            target.copy_(weights[name])
    for number, optimizer in enumerate(optimizers):
        tree = optimizer.state_dict()
        for name, tensor in _part(tensors, f"optimizer.{number}.").items():
            index, _, key = name.partition(".")
            tree["state"].setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict(tree)
    torch.set_rng_state(tensors["rng.cpu"])
    if "rng.cuda" in tensors and device.type == "cuda":
        torch.cuda.set_rng_state(tensors["rng.cuda"], device)


def stream_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the saved tensors of the window stream, by the stream's own names."""
    return _part(tensors, "data.")


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Returns the tensors whose name begins with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _untied_state(model: nn.Module) -> dict[str, Tensor]:
    """Returns the state dict with each tensor once, because safetensors holds no aliases."""
    unique: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        unique.setdefault(id(tensor), (name, tensor))
    return dict(unique.values())

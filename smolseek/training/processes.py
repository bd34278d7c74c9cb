"""The processes that run one training together: a single one, or those that torchrun started (FSDP2).

`Processes` says what a run asks of them. With one process every answer is trivial.

Shapes: B windows, T tokens in each, E n_routed_experts, L num_hidden_layers (those with experts).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from smolseek.checkpoint.state import load_plain, load_state, new_state, newest_whole_state, save_state
from smolseek.config import ParallelSettings, TrainSettings
from smolseek.model.skeleton import keep_whole
from smolseek.numerics.shares import ALONE, GroupShares, Shares
from smolseek.training.expert_parallel import distribute_experts
from smolseek.training.sharded_state import has_shards, read_parts, read_shards, write_shards

TIMEOUT = timedelta(hours=2)
"""How long a step that all processes take may wait for one of them. For what the leading one does alone the others wait
without an end (`GroupShares`)."""

Value = TypeVar("Value")


class Processes(Protocol):
    """What a run asks of the processes that share its work."""

    leads: bool
    """Whether this process logs and writes."""
    size: int
    """How many processes there are."""
    shares: Shares
    """How they divide a conversion, and the windows of a text that they measure."""

    def check_settings(self, settings: TrainSettings) -> None:
        """Refuse settings that cannot be divided among the processes (ValueError)."""

    def shard(self, model: Any) -> Any:
        """Divide a model without memory (on the meta device) among them, and return it; of one process: `keep_whole`.

        All processes must then load, run and save it together.
        """

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Make an optimizer fit for the parameters of a model that `shard` divided."""

    def own_windows(self, windows_BT: Tensor) -> Tensor:
        """Returns this process's share of the windows of a micro-batch."""

    def mean(self, value: float) -> float:
        """Returns the mean of all processes' values."""

    def sum(self, tensor: Tensor) -> Tensor:
        """Returns the sum of all processes' tensors."""

    def any_of(self, flag: bool) -> bool:
        """Returns whether the flag is set in any process."""

    def sum_counts(self, counts: list[tuple[int, Tensor]]) -> list[tuple[int, Tensor]]:
        """Returns the expert counts of `balance.take_expert_counts`, summed over the processes."""

    def clip_gradients(self, model: nn.Module, max_norm: float) -> float:
        """Scale the gradients to a global norm of at most `max_norm` and return the norm they had before."""

    def in_lockstep(self, model: Any) -> AbstractContextManager[None]:
        """While open, the model's head gives every process the logits of the leading one, so all draw the same text."""

    def from_leader(self, value: Value) -> Value:
        """Returns the leading process's value in every process."""

    def leader_first(self) -> AbstractContextManager[None]:
        """A block that the leading process runs before the others."""

    def save_state(
        self, checkpoints: Path, step: int, plain: dict[str, Any], tensors: dict[str, Tensor], *, keep_last: int
    ) -> Path:
        """Write a training state as `checkpoint.state.save_state` does, complete or not at all, and return its folder.

        Raises:
            OSError: a process cannot write; the earlier states are untouched.
        """

    def newest_state(self, checkpoints: Path) -> Path | None:
        """Returns the newest undamaged state, as `checkpoint.state.newest_whole_state` does."""

    def load_state(self, folder: Path, live: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Returns the JSON part and the tensors of a training state that any number of processes wrote.

        `live` has the run's own tensors by name; a saved tensor that belongs to one of them (see
        `sharded_state.live_tensor`) is sharded as that one is.

        Raises:
            ValueError: the files are damaged.
        """


class OneProcess:
    """`Processes` of a run in a single process."""

    leads = True
    size = 1
    shard = staticmethod(keep_whole)
    shares: Shares = ALONE

    def check_settings(self, settings: TrainSettings) -> None:
        pass

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        pass

    def own_windows(self, windows_BT: Tensor) -> Tensor:
        return windows_BT

    def mean(self, value: float) -> float:
        return value

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def any_of(self, flag: bool) -> bool:
        return flag

    def sum_counts(self, counts: list[tuple[int, Tensor]]) -> list[tuple[int, Tensor]]:
        return counts

    def clip_gradients(self, model: nn.Module, max_norm: float) -> float:
        return torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm).item()

    def in_lockstep(self, model: Any) -> AbstractContextManager[None]:
        return nullcontext()

    def from_leader(self, value: Value) -> Value:
        return value

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        yield

    def save_state(
        self, checkpoints: Path, step: int, plain: dict[str, Any], tensors: dict[str, Tensor], *, keep_last: int
    ) -> Path:
        return save_state(checkpoints, step, plain, tensors, keep_last=keep_last)

    def newest_state(self, checkpoints: Path) -> Path | None:
        return newest_whole_state(checkpoints)

    def load_state(self, folder: Path, live: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return (load_plain(folder), read_shards(folder)) if has_shards(folder) else load_state(folder)


class TorchrunProcesses:
    """`Processes` of a run that torchrun started. All of them must see one file system.

    FSDP2 (`fully_shard`) shards every weight over all processes. With `settings.expert` = n, each n neighbouring
    processes divide the experts of a layer among themselves (`expert_parallel`), and FSDP2 shards a process's experts
    over the processes that hold the same ones.
    """

    def __init__(self, settings: ParallelSettings, device_type: str) -> None:
        from torch.distributed import get_rank, get_world_size
        from torch.distributed.device_mesh import init_device_mesh

        self.rank, self.size = get_rank(), get_world_size()
        self.leads = self.rank == 0
        self.shares: Shares = GroupShares()
        self.expert_processes = settings.expert
        shape = (self.size // settings.expert, settings.expert)
        self.mesh = init_device_mesh(device_type, shape, mesh_dim_names=("data", "expert"))
        self.all_processes = self.mesh._flatten("everyone")
        self.device = (
            torch.device("cuda", torch.cuda.current_device()) if device_type == "cuda" else torch.device("cpu")
        )

    def check_settings(self, settings: TrainSettings) -> None:
        if settings.batch_windows % self.size:
            raise ValueError(
                f"train.batch_windows {settings.batch_windows}: must be a multiple of the {self.size} processes, which "
                "divide every micro-batch among them"
            )
        if settings.compile:
            raise ValueError(
                f"train.compile with {self.size} processes: sharded blocks are not compiled; leave it out, or use one "
                "process"
            )

    def shard(self, model: Any) -> Any:
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        if self.expert_processes > 1:
            distribute_experts(model, self.mesh)
        for layer in _decoder_layers(model):
            fully_shard(layer, mesh=self.all_processes)
        fully_shard(model, mesh=self.all_processes)
        register_fsdp_forward_method(model, "hidden_states")
        return model

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        if self.expert_processes > 1:  # DTensor has no single kernel for tensors of two meshes
            for group in optimizer.param_groups:
                group["fused"] = group["foreach"] = False

    def own_windows(self, windows_BT: Tensor) -> Tensor:
        assert len(windows_BT) % self.size == 0
        return windows_BT[self.rank :: self.size]

    def mean(self, value: float) -> float:
        return self.sum(torch.tensor(value, dtype=torch.float64)).item() / self.size

    def sum(self, tensor: Tensor) -> Tensor:
        from torch.distributed import all_reduce

        total = tensor.to(self.device, copy=True)
        all_reduce(total)
        return total

    def any_of(self, flag: bool) -> bool:
        return self.sum(torch.tensor(int(flag))).item() > 0

    def sum_counts(self, counts: list[tuple[int, Tensor]]) -> list[tuple[int, Tensor]]:
        if not counts:
            return counts
        total_LE = self.sum(torch.stack([counts_E for _, counts_E in counts]))
        return [(layer, total_E) for (layer, _), total_E in zip(counts, total_LE, strict=True)]

    def clip_gradients(self, model: nn.Module, max_norm: float) -> float:
        # Every element of a gradient lies in exactly one process, whatever mesh its tensor is on.
        gradients = [p.grad.to_local() for p in model.parameters() if p.grad is not None]  # type: ignore[attr-defined]
        squares = torch.stack([gradient.double().square().sum() for gradient in gradients]).sum()
        norm = self.sum(squares).sqrt().item()
        scale = max_norm / (norm + 1e-6)
        if scale < 1:
            for gradient in gradients:
                gradient.mul_(scale)
        return norm

    @contextmanager
    def in_lockstep(self, model: Any) -> Iterator[None]:
        from torch.distributed import broadcast

        def take_leaders(module: nn.Module, inputs: Any, logits: Tensor) -> Tensor:
            logits = logits.contiguous()
            broadcast(logits, src=0)
            return logits

        handle = model.lm_head.register_forward_hook(take_leaders)
        try:
            yield
        finally:
            handle.remove()

    def from_leader(self, value: Value) -> Value:
        return self.shares.by_leader(lambda: value)

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        if not self.leads:
            self.shares.wait()
        yield
        if self.leads:
            self.shares.wait()

    def save_state(
        self, checkpoints: Path, step: int, plain: dict[str, Any], tensors: dict[str, Tensor], *, keep_last: int
    ) -> Path:
        if self.leads:
            with new_state(checkpoints, step, keep_last=keep_last) as folder:
                write_shards(self.from_leader(folder), tensors)
                (folder / "state.json").write_text(json.dumps(plain), encoding="utf-8")
        else:
            write_shards(self.from_leader(checkpoints), tensors)
        self.shares.wait()
        return checkpoints / f"step-{step:08d}"

    def newest_state(self, checkpoints: Path) -> Path | None:
        return self.from_leader(newest_whole_state(checkpoints) if self.leads else None)

    def load_state(self, folder: Path, live: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return load_plain(folder), (read_shards if has_shards(folder) else read_parts)(folder, live)


@contextmanager
def join_processes(settings: ParallelSettings, device: str) -> Iterator[tuple[Processes, str]]:
    """While open: the processes that take part in the run, and this one's device.

    They are torchrun's processes where torchrun started this one, else this one alone.

    Raises:
        ValueError: `settings.expert` does not divide their number.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if settings.expert < 1 or size % settings.expert:
        raise ValueError(
            f"parallel.expert {settings.expert}: must divide the number of processes, which is {size}; start them with "
            "torchrun --nproc-per-node N train.py"
        )
    if size == 1:
        yield OneProcess(), device
        return
    from torch.distributed import PrefixStore, destroy_process_group, init_process_group
    from torch.distributed.rendezvous import rendezvous

    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, rank, _ = next(rendezvous("env://", timeout=TIMEOUT))
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    init_process_group(backend, store=PrefixStore(_attempt(), store), rank=rank, world_size=size, timeout=TIMEOUT)
    try:
        yield TorchrunProcesses(settings, device), f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" else device
    finally:
        destroy_process_group()


def _attempt() -> str:
    """Returns a name for this start of the processes.

    torchrun keeps its store over a restart, dead addresses included, so each start needs a prefix of its own. On
    several machines each counts its own restarts, and the number would differ: docs/training.md has the variable that
    renews the store.
    """
    one_machine = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if one_machine else "0"


def restarted_by_torchrun() -> bool:
    """Returns whether torchrun started this process again after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def _decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Returns the decoder layers of one of our models or of transformers'."""
    lists = [module for name, module in model.named_modules() if name.endswith("layers")]
    assert len(lists) == 1 and isinstance(lists[0], nn.ModuleList)
    return lists[0]

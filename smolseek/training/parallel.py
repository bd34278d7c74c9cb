"""One run in several processes: FSDP2, expert parallelism, sharded checkpoints; the only place with process groups.

A run asks its surroundings a handful of things (which rows are mine, what is the mean, who writes); `Alone` answers for
one process by doing nothing, `Together` for the processes that torchrun started.

Shapes: N windows, T tokens, E routed experts, G processes that share the experts, L = E / G experts of one of them,
M rows sorted by expert, D hidden, I moe_intermediate_size.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from smolseek.checkpoint.state import load_plain, load_state, new_state, newest_whole_state, save_state
from smolseek.config import ParallelSettings, TrainSettings
from smolseek.model.experts import Experts, MixtureOfExperts, swiglu_experts

SHARDS = "sharded"
"""Folder of a training state that holds its tensors when several processes wrote them."""
TIMEOUT = timedelta(hours=2)
"""How long processes wait for the leading one, which evaluates, samples and writes alone."""

Value = TypeVar("Value")


class Alone:
    """What a run asks of its surroundings, answered for a single process."""

    leads = True
    """Whether this process logs, evaluates and writes."""
    size = 1
    """How many processes there are."""

    def check(self, settings: TrainSettings) -> None:
        """Refuse settings that cannot be divided among the processes (ValueError)."""

    def shard(self, model: Any) -> Any:
        """The model as this process trains it."""
        return model

    def prepare(self, optimizer: torch.optim.Optimizer) -> None:
        """Make an optimizer fit for the parameters of `shard`."""

    def rows(self, ids_NT: Tensor) -> Tensor:
        """This process's rows of a global batch."""
        return ids_NT

    def mean(self, value: float) -> float:
        """Mean over the processes."""
        return value

    def agree(self, flag: bool) -> bool:
        """Whether any process says yes."""
        return flag

    def add(self, counts: list[tuple[int, Tensor]]) -> list[tuple[int, Tensor]]:
        """Expert counts of `balance.take_expert_counts`, summed over the processes."""
        return counts

    def clip(self, model: nn.Module, max_norm: float) -> float:
        """Scale the gradients to a global norm of at most `max_norm` and return the norm they had."""
        return torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm).item()

    @contextmanager
    def whole(self, model: Any) -> Iterator[Any]:
        """The model with all its weights in the leading process, None in the others, which wait."""
        yield model

    def share(self, value: Value) -> Value:
        """The leading process's value, in every process."""
        return value

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """A block that the leading process goes through before the others."""
        yield

    def save(
        self, checkpoints: Path, step: int, plain: dict[str, Any], tensors: dict[str, Tensor], *, keep_last: int
    ) -> Path:
        """Write a training state, as `checkpoint.state.save_state`."""
        return save_state(checkpoints, step, plain, tensors, keep_last=keep_last)

    def newest(self, checkpoints: Path) -> Path | None:
        """The newest undamaged state, as `checkpoint.state.newest_whole_state`."""
        return newest_whole_state(checkpoints)

    def load(self, folder: Path, owners: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """A training state that any number of processes wrote; a tensor of the shape of its owner (the live tensor
        under its name, or under its name without the last part) lies where the owner does.

        Raises:
            ValueError: the files are damaged.
        """
        if not (folder / SHARDS).is_dir():
            return load_state(folder)
        return load_plain(folder), _read_shards(folder / SHARDS, owners, alone=True)


class Together(Alone):
    """The same, answered for processes of one torchrun.

    With `settings.expert` = G every G neighbouring processes share the experts of each layer among them, and tokens
    travel to their experts and back; everything else, and each share of the experts, is sharded by FSDP2
    (`fully_shard`) over all processes that hold it. Needs a file system that all processes see.
    """

    def __init__(self, settings: ParallelSettings, device_type: str) -> None:
        from torch.distributed import get_rank, get_world_size
        from torch.distributed.device_mesh import init_device_mesh

        self.rank, self.size = get_rank(), get_world_size()
        self.leads = self.rank == 0
        self.experts_over = settings.expert
        shape = (self.size // settings.expert, settings.expert)
        self.mesh = init_device_mesh(device_type, shape, mesh_dim_names=("data", "expert"))
        self.everyone = self.mesh._flatten("everyone")
        self.device = (
            torch.device("cuda", torch.cuda.current_device()) if device_type == "cuda" else torch.device("cpu")
        )
        self.replica: Any = None

    def check(self, settings: TrainSettings) -> None:
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
        if settings.optimizer == "muon":
            raise ValueError(
                f"train.optimizer muon with {self.size} processes: Muon needs whole matrices, which are sharded; use "
                "adamw, or one process"
            )

    def shard(self, model: Any) -> Any:
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        if self.leads:
            self.replica = copy.deepcopy(model).cpu().eval()
        if self.experts_over > 1:
            self._share_experts(model)
        for block in _blocks(model):
            fully_shard(block, mesh=self.everyone)
        fully_shard(model, mesh=self.everyone)
        register_fsdp_forward_method(model, "hidden_states")
        return model

    def _share_experts(self, model: nn.Module) -> None:
        """Each layer's experts divided among the processes of the mesh's "expert" axis, FSDP over its "data" axis."""
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import Shard

        mixtures = [module for module in model.modules() if isinstance(module, MixtureOfExperts)]
        if not mixtures:
            raise ValueError(f"parallel.expert {self.experts_over}: the model has no experts; leave it at 1")
        holders = self.size // self.experts_over
        for mixture in mixtures:
            experts, out_width, in_width = mixture.experts.gate_up_proj.shape
            if experts % self.experts_over or out_width % holders or in_width % holders:
                raise ValueError(
                    f"parallel.expert {self.experts_over} with {self.size} processes: {experts} experts, each "
                    f"{out_width} × {in_width}, must divide by {self.experts_over}, their sizes by {holders}"
                )
            mixture.experts = SharedExperts(mixture.experts, self.mesh["expert"])
            fully_shard(mixture.experts, mesh=self.mesh["data"], shard_placement_fn=lambda parameter: Shard(1))
            # A process's experts see the tokens of its whole group, and the loss is a mean over all processes.
            if holders > 1:  # gloo cannot scale while it sums; alone, FSDP would divide twice
                mixture.experts.set_force_sum_reduction_for_comms(True)  # type: ignore[operator]
            mixture.experts.set_gradient_divide_factor(float(self.size))  # type: ignore[operator]

    def prepare(self, optimizer: torch.optim.Optimizer) -> None:
        if self.experts_over > 1:  # one kernel for tensors of two meshes is more than DTensor does
            for group in optimizer.param_groups:
                group["fused"] = group["foreach"] = False

    def rows(self, ids_NT: Tensor) -> Tensor:
        assert len(ids_NT) % self.size == 0
        return ids_NT[self.rank :: self.size]

    def mean(self, value: float) -> float:
        return self._sum(torch.tensor(value, dtype=torch.float64)).item() / self.size

    def agree(self, flag: bool) -> bool:
        return self._sum(torch.tensor(int(flag))).item() > 0

    def add(self, counts: list[tuple[int, Tensor]]) -> list[tuple[int, Tensor]]:
        if not counts:
            return counts
        total_LE = self._sum(torch.stack([counts_E for _, counts_E in counts]))
        return [(layer, total_E) for (layer, _), total_E in zip(counts, total_LE, strict=True)]

    def clip(self, model: nn.Module, max_norm: float) -> float:
        # Every element of a gradient lies in exactly one process, whatever mesh its tensor is on.
        gradients = [p.grad.to_local() for p in model.parameters() if p.grad is not None]  # type: ignore[attr-defined]
        squares = torch.stack([gradient.double().square().sum() for gradient in gradients]).sum()
        norm = self._sum(squares).sqrt().item()
        scale = max_norm / (norm + 1e-6)
        if scale < 1:
            for gradient in gradients:
                gradient.mul_(scale)
        return norm

    @contextmanager
    def whole(self, model: Any) -> Iterator[Any]:
        self._gather(model)
        try:
            yield self.replica.to(self.device) if self.leads else None
        finally:
            if self.leads:
                self.replica.cpu()
        self._wait()

    @torch.no_grad()
    def _gather(self, model: nn.Module) -> None:
        """The weights of all processes in the leading one's replica."""
        targets = self.replica.state_dict() if self.leads else {}
        for name, tensor in model.state_dict().items():
            full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            if self.leads:
                targets[name].copy_(full)

    def share(self, value: Value) -> Value:
        from torch.distributed import broadcast_object_list

        box = [value]
        broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        if not self.leads:
            self._wait()
        yield
        if self.leads:
            self._wait()

    def save(
        self, checkpoints: Path, step: int, plain: dict[str, Any], tensors: dict[str, Tensor], *, keep_last: int
    ) -> Path:
        """By `torch.distributed.checkpoint`: each process writes its shards; complete or absent as a whole.

        Raises:
            OSError: a process cannot write; the states before this one are untouched.
        """
        if self.leads:
            with new_state(checkpoints, step, keep_last=keep_last) as folder:
                self._write_shards(self.share(folder), tensors)
                (folder / "state.json").write_text(json.dumps(plain), encoding="utf-8")
        else:
            self._write_shards(self.share(checkpoints), tensors)
        self._wait()
        return checkpoints / f"step-{step:08d}"

    def _write_shards(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        import torch.distributed.checkpoint as dcp

        try:
            dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder / SHARDS))
        except dcp.api.CheckpointException as error:
            rank, failure = next(iter(error.failures.items()))
            raise OSError(f"process {rank}: {failure[0]}") from error

    def newest(self, checkpoints: Path) -> Path | None:
        return self.share(newest_whole_state(checkpoints) if self.leads else None)

    def load(self, folder: Path, owners: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        from torch.distributed.tensor import DTensor, distribute_tensor

        if (folder / SHARDS).is_dir():
            return load_plain(folder), _read_shards(folder / SHARDS, owners, alone=False)
        plain, tensors = load_state(folder)
        for name, tensor in tensors.items():
            owner = _owner(name, tensor.shape, owners)
            if isinstance(owner, DTensor):
                tensors[name] = distribute_tensor(tensor.to(self.device), owner.device_mesh, owner.placements)
        return plain, tensors

    def _sum(self, tensor: Tensor) -> Tensor:
        from torch.distributed import all_reduce

        total = tensor.to(self.device)
        all_reduce(total)
        return total

    def _wait(self) -> None:
        from torch.distributed import barrier

        barrier()


class SharedExperts(Experts):
    """The experts of a layer, L of them in each process of a group: rows travel to the process of their expert and back
    (all-to-all; DeepSeek-V3, section 3.2)."""

    def __init__(self, experts: Experts, mesh: Any) -> None:
        from torch.distributed.tensor import Shard, distribute_tensor

        nn.Module.__init__(self)
        self.group, self.group_size, self.act_fn = mesh.get_group(), mesh.size(), experts.act_fn
        for name, parameter in experts.named_parameters():
            share = distribute_tensor(parameter.data, mesh, [Shard(0)])
            self.register_parameter(name, nn.Parameter(share, requires_grad=parameter.requires_grad))

    def forward(self, x_MD: Tensor, ends_E: Tensor, weights_M1: Tensor) -> Tensor:
        """As `Experts.forward`."""
        sent_GL = torch.diff(ends_E, prepend=ends_E.new_zeros(1)).view(self.group_size, -1)
        received_GL = self._exchange(sent_GL, [1] * self.group_size, [1] * self.group_size)
        sent, received = sent_GL.sum(1).tolist(), received_GL.sum(1).tolist()
        rows_MD, weights_M1 = (self._exchange(rows, received, sent) for rows in (x_MD, weights_M1))
        # They lie by process of origin, then by expert.
        local_M = torch.arange(sent_GL.shape[1], device=x_MD.device).repeat(self.group_size)
        order_M = local_M.repeat_interleave(received_GL.flatten()).argsort(stable=True)
        ends_L = received_GL.sum(0).cumsum(0).int()
        out_MD = self._compute(rows_MD.index_select(0, order_M), weights_M1.index_select(0, order_M), ends_L)
        return self._exchange(out_MD.index_select(0, order_M.argsort()), sent, received)

    def _compute(self, x_MD: Tensor, weights_M1: Tensor, ends_L: Tensor) -> Tensor:
        gate_up_LJD, down_LDI = (parameter.to_local() for parameter in (self.gate_up_proj, self.down_proj))  # type: ignore[attr-defined]
        return swiglu_experts(x_MD, weights_M1, gate_up_LJD, down_LDI, ends_L, self.act_fn)

    def _exchange(self, rows: Tensor, received: list[int], sent: list[int]) -> Tensor:
        """All-to-all along the first dimension; differentiable."""
        from torch.distributed._functional_collectives import all_to_all_single_autograd

        return all_to_all_single_autograd(rows.contiguous(), received, sent, self.group)


@contextmanager
def join(settings: ParallelSettings, device: str) -> Iterator[tuple[Alone, str]]:
    """The processes that take part in a run, and the device of this one: those of torchrun, else this one alone.

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
        yield Alone(), device
        return
    from torch.distributed import PrefixStore, destroy_process_group, init_process_group
    from torch.distributed.rendezvous import rendezvous

    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, rank, _ = next(rendezvous("env://", timeout=TIMEOUT))
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    init_process_group(backend, store=PrefixStore(_attempt(), store), rank=rank, world_size=size, timeout=TIMEOUT)
    try:
        yield Together(settings, device), f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" else device
    finally:
        destroy_process_group()


def _attempt() -> str:
    """A name for this start of the processes: torchrun keeps its store over a restart, and with it dead addresses.

    On several machines each counts its own restarts: docs/training.md has the variable that renews the store.
    """
    one_machine = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if one_machine else "0"


def restarted() -> bool:
    """Whether torchrun started this process again after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def _blocks(model: nn.Module) -> Iterable[nn.Module]:
    """The decoder layers of our model or of a transformers one: the modules of its one list of layers."""
    lists = [module for name, module in model.named_modules() if name.endswith("layers")]
    assert len(lists) == 1 and isinstance(lists[0], nn.ModuleList)
    return lists[0]


def _owner(name: str, shape: torch.Size, owners: Mapping[str, Tensor]) -> Tensor | None:
    """The live tensor that a saved one lies beside, if it has the same shape."""
    owner = owners.get(name, owners.get(name.rpartition(".")[0]))
    return owner if owner is not None and owner.shape == shape else None


def _read_shards(folder: Path, owners: Mapping[str, Tensor], *, alone: bool) -> dict[str, Tensor]:
    """Every tensor of a sharded state, like its owner where it has one."""
    import torch.distributed.checkpoint as dcp

    try:
        saved = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
        tensors: dict[str, Any] = {}
        for name, entry in saved.items():
            assert isinstance(entry, dcp.metadata.TensorStorageMetadata)  # everything else is in state.json
            owner = None if alone else _owner(name, entry.size, owners)
            dtype = entry.properties.dtype
            tensors[name] = torch.empty(entry.size, dtype=dtype)
            if owner is not None:
                tensors[name] = torch.zeros_like(owner.detach(), dtype=dtype)
        dcp.load(tensors, storage_reader=dcp.FileSystemReader(folder), no_dist=alone)
    except (OSError, dcp.api.CheckpointException) as error:
        raise ValueError(f"{folder.parent}: damaged training state ({error}); start over with --force") from error
    return tensors

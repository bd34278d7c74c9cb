"""What each of four processes does in the test of sharded Muon. It imports little, so that the processes start soon."""

import math
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from smolseek.numerics import muon
from smolseek.numerics.muon import Muon, matrix_parts

PROCESSES = 4
ROWS = {f"layers.{layer}.{name}.weight": (10, 6) for layer in range(3) for name in ("q_proj", "o_proj")}
ROWS |= {"kv_a_proj.weight": (3, 8)}  # fewer rows than processes
WHOLE_EXPERTS = {"experts.gate_up_proj": (6, 8, 5), "experts.down_proj": (6, 5, 4)}
DIVIDED_EXPERTS = {"0.experts.gate_up_proj": (4, 12, 6), "0.experts.down_proj": (4, 6, 6)}
DIVIDED_EXPERTS |= {"1.experts.down_proj": (2, 4, 6)}  # one expert in each half, for two processes that hold it


def check(rank: int, folder: str) -> None:
    """Compare the steps of four processes with those of one."""
    store = f"file://{Path(folder) / 'store'}"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=PROCESSES)
    try:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "expert"))
        everyone = mesh._flatten("everyone")
        placed = {name: (everyone, [Shard(0)]) for name in ROWS | WHOLE_EXPERTS}
        placed |= {name: (mesh, [Shard(1), Shard(0)]) for name in DIVIDED_EXPERTS}
        iterated = torch.zeros((), dtype=torch.int64)
        iterate = muon.orthogonal

        def counted(update_POA: Tensor) -> Tensor:
            iterated.add_(len(update_POA))
            return iterate(update_POA)

        muon.orthogonal = counted  # type: ignore[assignment]
        for exact, bound in ((True, 1e-5), (False, 2e-3)):  # a step in bf16 is known to 1% or so
            muon.has_bfloat16 = lambda device, exact=exact: not exact  # type: ignore[assignment, misc]
            ours, alone = (trained(by) for by in (placed, None))
            for name, weight in ours.items():
                difference = (weight.full_tensor() - alone[name]).abs().max()  # type: ignore[operator]
                assert difference < bound, (name, exact, difference)
        matrices = sum(math.prod((*p.shape[:-2], *matrix_parts(name))) for name, p in alone.items())
        distributed.all_reduce(iterated)
        # In each of the two comparisons: 3 steps of every matrix in one of the processes, and 3 of each process alone.
        assert iterated == 2 * 3 * matrices * (1 + PROCESSES), iterated
    finally:
        distributed.destroy_process_group()


def trained(placed: dict | None) -> dict[str, nn.Parameter]:
    """Returns weights after three steps with given gradients, sharded if it is said how."""
    generator = torch.Generator().manual_seed(0)

    def drawn(name: str) -> Tensor:
        whole = torch.randn(SHAPES[name], generator=generator)
        return distribute_tensor(whole, *placed[name]) if placed else whole

    weights = {name: nn.Parameter(drawn(name)) for name in SHAPES}
    optimizer = Muon([{"params": list(weights.items()), "weight_decay": 0.1}], lr=0.1)
    for _ in range(3):
        for name, weight in weights.items():
            weight.grad = drawn(name)
        optimizer.step()
        optimizer.zero_grad()
    return weights


SHAPES = ROWS | WHOLE_EXPERTS | DIVIDED_EXPERTS

"""One process that takes itself for one of several; what they would send it never comes."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed import destroy_process_group, init_process_group
from torch.testing._internal.distributed.fake_pg import FakeStore

from smolseek.config import ParallelSettings
from smolseek.training.processes import TorchrunProcesses


@contextmanager
def process(rank: int, size: int, expert: int = 1) -> Iterator[TorchrunProcesses]:
    """While open: the processes as number `rank` of `size` sees them."""
    store = FakeStore()
    init_process_group("fake", store=store, rank=rank, world_size=size)
    try:
        yield TorchrunProcesses(ParallelSettings(expert), "cpu")
    finally:
        destroy_process_group()

"""What each of several processes holds of a divided tensor."""

import itertools
from types import SimpleNamespace

import torch
from torch.distributed.tensor import Shard

from smolseek.model import DeepseekV3
from smolseek.model.skeleton import take_memory
from smolseek.numerics.shards import gathers_weights, is_divided, own_part, release_gathered, whole
from tests.factories import tiny_v3, tiny_v3_config
from tests.fake_processes import process


def test_what_is_whole_is_its_own_part():
    tensor, model = torch.zeros(3, 5), tiny_v3()
    part, bounds = own_part(tensor)
    assert part is tensor and bounds == (slice(0, 3), slice(0, 5)) and whole(tensor) is tensor
    assert not is_divided(tensor) and not gathers_weights(model)
    release_gathered(model)


def test_the_parts_of_all_processes_make_the_whole():
    """Also where a dimension does not divide by their number."""
    seen = {}
    for rank in range(3):
        with process(rank, 3) as processes:
            with torch.device("meta"):
                skeleton = DeepseekV3(tiny_v3_config())
            model = take_memory(processes.shard(skeleton), "cpu")
            assert gathers_weights(model)
            for name, parameter in model.named_parameters():
                part, bounds = own_part(parameter)
                assert is_divided(parameter) and part.device.type == "cpu"
                seen.setdefault(name, torch.zeros(parameter.shape))[bounds] += 1
    assert seen and all((count == 1).all() for count in seen.values())


class OfSixteen:
    """A tensor (7, 6, 5) whose experts are divided by 4 processes and whose rows by 4 others."""

    shape, placements = (7, 6, 5), (Shard(1), Shard(0))
    full_tensor = None

    def __init__(self, row_rank, expert_rank):
        self.device_mesh = SimpleNamespace(size=lambda axis: 4, get_local_rank=(row_rank, expert_rank).__getitem__)

    def to_local(self):
        _, bounds = expected(*(self.device_mesh.get_local_rank(axis) for axis in range(2)))
        return torch.zeros(self.shape)[bounds]


def expected(row_rank, expert_rank):
    """The chunks that torch makes: of 7 experts 2, 2, 2, 1, of 6 rows 2, 2, 2 and none."""
    experts = [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 7)][expert_rank]
    rows = [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 6)][row_rank]
    return None, (experts, rows, slice(0, 5))


def test_two_dimensions_can_be_divided():
    for row_rank, expert_rank in itertools.product(range(4), repeat=2):
        part, bounds = own_part(OfSixteen(row_rank, expert_rank))
        assert bounds == expected(row_rank, expert_rank)[1] and part.shape == torch.zeros(7, 6, 5)[bounds].shape

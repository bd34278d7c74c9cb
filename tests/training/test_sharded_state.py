"""Training states that one process wrote, read by several."""

import pytest
import torch

from smolseek.checkpoint.state import save_state
from smolseek.config import TrainSettings
from smolseek.model import DeepseekV3
from smolseek.model.skeleton import draw_weights
from smolseek.numerics.shards import is_divided, own_part
from smolseek.training.optimizer import build_optimizers
from smolseek.training.saved_tensors import collect_tensors, live_tensors
from tests.factories import tiny_v3_config
from tests.fake_processes import process


def skeleton():
    with torch.device("meta"):
        return DeepseekV3(tiny_v3_config())


@pytest.fixture
def saved(tmp_path):
    """The tensors of a state, weights and moments, and its folder."""
    model = draw_weights(skeleton(), 1)
    optimizers = build_optimizers(model, TrainSettings())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizers[0].step()
    tensors = collect_tensors(model, optimizers, {"order": torch.arange(5)}, torch.device("cpu"))
    return tensors, save_state(tmp_path, 1, {"step": 1}, tensors)


def test_each_process_reads_its_part_of_a_whole_state(saved):
    tensors, folder = saved
    for rank in range(3):
        with process(rank, 3) as processes:
            model = draw_weights(skeleton(), 2, shard=processes.shard)
            live = live_tensors(model, build_optimizers(model, TrainSettings()))
            plain, read = processes.load_state(folder, live)
            assert plain == {"step": 1} and read.keys() == tensors.keys()
            for name, tensor in read.items():
                part, bounds = own_part(tensor)
                assert torch.equal(part, tensors[name][bounds]), name
            divided = {name for name, tensor in read.items() if is_divided(tensor)}
            assert {f"model.{name}" for name, _ in model.named_parameters()} <= divided
            assert sum(name.endswith("exp_avg_sq") for name in divided) == len(list(model.parameters()))


def test_a_damaged_state_is_named(saved):
    _, folder = saved
    (folder / "tensors").write_bytes(b"nothing")
    with process(0, 3) as processes, pytest.raises(ValueError, match="damaged training state"):
        processes.load_state(folder, {})

"""A training step on a GPU is queued as a whole: nothing on the way reads a number, which would wait for the GPU."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from smolseek.config import TrainSettings
from smolseek.model.experts import place_rows
from smolseek.training.objective import window_loss
from smolseek.training.optimizer import build_optimizers
from tests.factories import random_ids, tiny_v3
from tests.fake_cuda import CUDA, cuda_model, fake_cuda

READS = {torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal, torch.ops.aten.is_nonzero}


class NoReads(TorchDispatchMode):
    """Fails where a number is read, or a shape depends on one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket not in READS, f"{func} reads numbers"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("distill_weight", [0.0, 0.5])
def test_loss_and_muon_read_no_number(distill_weight: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss computes the head's gradients on its way forward."""
    monkeypatch.setattr("smolseek.model.transformer.has_kernel", lambda *_: False)  # it compiles
    monkeypatch.setattr("smolseek.numerics.muon.has_bfloat16", lambda _: True)
    with fake_cuda(numbers=False):
        model, teacher = cuda_model(torch.bfloat16).train(), cuda_model(torch.bfloat16)
        windows = torch.zeros(2, 17, dtype=torch.int32)
        window_loss(model, windows, TrainSettings(), teacher=teacher, distill_weight=distill_weight)  # type: ignore[arg-type]
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        build_optimizers(model, TrainSettings(optimizer="muon"))[0].step()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_backward_pass_reads_no_number(checkpointing: bool) -> None:
    model = tiny_v3(hidden_size=64, moe_intermediate_size=32).train()
    model.model.activation_checkpointing = checkpointing
    hidden_BTD = model.hidden_states(random_ids(2, 9))
    with NoReads():
        hidden_BTD.sin().sum().backward()
    assert model.model.layers[1].mlp.experts.gate_up_proj.grad is not None  # type: ignore[union-attr, index]


def test_a_number_that_is_read_is_noticed() -> None:
    with fake_cuda(numbers=False):
        counts = torch.zeros(4, dtype=torch.int64, device=CUDA)
        place_rows(torch.zeros(3, 2, dtype=torch.int64, device=CUDA), counts, 1)
        for read in (counts.tolist, counts.nonzero, counts.sum().item, lambda: bool(counts.all())):
            with pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
                read()
    with NoReads():
        for read in (torch.ones(3).nonzero, torch.ones(()).item, lambda: bool(torch.ones(()))):
            with pytest.raises(AssertionError):
                read()

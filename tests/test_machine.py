"""How fast a device is."""

import pytest
import torch

from smolseek.machine import measure_machine


def test_this_machine_is_plausible() -> None:
    machine = measure_machine(seconds=0.1)
    assert 1e7 < machine.flops_per_second < 1e15 and 1e7 < machine.bytes_per_second < 1e14
    assert machine.device == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one here")
def test_a_device_that_is_not_here_is_refused() -> None:
    with pytest.raises(ValueError, match="device cuda: not available here; use cpu"):
        measure_machine("cuda")

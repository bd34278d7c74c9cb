"""CUDA tensors without a GPU: shapes, dtypes and devices but no numbers; an operation on two devices is an error.

torch's FakeTensorMode makes them. A build of torch for the CPU has no CUDA device guard, which indexing asks for even
then: inside `fake_cuda` the guard of the meta device, which does nothing, stands in its place.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from smolseek.model import DeepseekV3
from smolseek.numerics import precision
from tests.factories import tiny_v3_config

CUDA = torch.device("cuda")
_CUDA_SLOT, _META_SLOT, _SLOTS = 1, 14, 21
_GUARDS = "_ZN3c104impl26device_guard_impl_registryE"
_NUMBERS = {"__float__": 1.0, "__int__": 1, "__bool__": True, "item": 1}
"""What a fake tensor is read as: it has no numbers, and a few are read for reports and rates."""


@contextmanager
def fake_cuda(*, numbers: bool = True) -> Iterator[None]:
    """Every tensor made inside is fake; on the CPU unless it says otherwise.

    Without `numbers` it is an error to read a CUDA tensor, which would wait for the GPU. A shape that depends on
    numbers always is one. Skips the test where this build of torch has no such registry of guards.
    """
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
        guards = (ctypes.c_void_p * _SLOTS).in_dll(library, _GUARDS)
    except (OSError, ValueError) as error:
        pytest.skip(f"no device guards to exchange in this build of torch ({error})")
    before = guards[_CUDA_SLOT]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in _NUMBERS.items():

            def read(self: FakeTensor, value: object = value) -> object:
                assert numbers or self.device.type == "cpu", "the CPU waits for the GPU here"
                return value

            patch.setattr(FakeTensor, name, read, raising=False)
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        patch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=9, minor=0))
        patch.setattr(precision, "has_bfloat16", lambda device: False)
        guards[_CUDA_SLOT] = before or guards[_META_SLOT]
        try:
            with FakeTensorMode(allow_non_fake_inputs=True):
                yield
        finally:
            guards[_CUDA_SLOT] = before


def cuda_model(dtype: torch.dtype = torch.float32, **sizes: Any) -> DeepseekV3:
    """Returns a fake model with aligned sizes that was made on the device: fake tensors cannot be moved."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with CUDA:
            return DeepseekV3(tiny_v3_config(hidden_size=64, moe_intermediate_size=32, **sizes)).eval()
    finally:
        torch.set_default_dtype(before)

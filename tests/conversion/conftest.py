"""Fixtures for the tests of the calibration and of the refinement."""

import pytest

from smolseek.numerics import precision
from tests.factories import tiny_llama


@pytest.fixture(scope="module")
def dense():
    """A dense model."""
    return tiny_llama()


@pytest.fixture(scope="module")
def teacher():
    """The same, frozen."""
    return tiny_llama().requires_grad_(False)


@pytest.fixture
def angles(dense):
    """Radians per position of the dense model's rotary frequencies."""
    return dense.model.rotary_emb.inv_freq.clone()


@pytest.fixture
def fp32(monkeypatch):
    """Products in fp32 wherever the test runs, as in the slow versions that it compares with."""
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: False)

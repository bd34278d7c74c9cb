"""Models, folders and settings that several tests of the conversion share."""

from typing import Any

import pytest

from smolseek.config import ConvertSettings
from smolseek.numerics import precision
from tests.conversion.folders import write_source
from tests.factories import tiny_llama
from tests.text import write_stories


@pytest.fixture(scope="module")
def dense():
    """A dense model."""
    return tiny_llama()


@pytest.fixture(scope="module")
def teacher():
    """The same dense model, frozen."""
    return tiny_llama().requires_grad_(False)


@pytest.fixture
def angles(dense):
    """Radians per position of the dense model's rotary frequencies."""
    return dense.model.rotary_emb.inv_freq.clone()


@pytest.fixture
def fp32(monkeypatch):
    """Products in fp32 on every machine, as in the slow versions that the tests compare with."""
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: False)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file of stories."""
    return str(write_stories(tmp_path_factory.mktemp("text") / "stories.txt"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The folder of a tiny dense Llama."""
    return write_source(tmp_path_factory.mktemp("source") / "tiny")


@pytest.fixture
def quick(text):
    """Makes settings for a conversion of seconds: few windows, no refinement."""

    def make(**changes):
        defaults: dict[str, Any] = {
            "calibration": (text,),
            "calibration_windows": 12,
            "calibration_window_tokens": 32,
            "refine_steps": 0,
        }
        return ConvertSettings(**defaults | changes)

    return make

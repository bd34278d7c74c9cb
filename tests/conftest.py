"""What every test has: the same random numbers in any order, and no deadline, since machines are shared."""

import pytest
import torch
from hypothesis import settings

settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Seeds torch, so that a test's numbers do not depend on the tests that ran before it in the same process."""
    torch.manual_seed(0)

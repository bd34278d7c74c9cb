import pytest

from smolseek.config import DataSettings
from tests.text import write_stories


@pytest.fixture
def settings(tmp_path):
    return DataSettings(train=(str(write_stories(tmp_path / "a.txt")),), shuffle_windows=8, held_out_share=0.2)

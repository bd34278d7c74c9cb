import pytest
import torch

from smolseek.checkpoint.state import latest_state, load_state, save_state


def test_the_newest_state_comes_back_and_older_ones_go(tmp_path):
    assert latest_state(tmp_path / "checkpoints") is None
    for step in (9, 10):
        save_state(tmp_path / "checkpoints", step, {"step": step}, {"a": torch.full((2,), step)})
    newest = latest_state(tmp_path / "checkpoints")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000010"]
    plain, tensors = load_state(newest)
    assert plain == {"step": 10} and tensors["a"].tolist() == [10, 10]


def test_what_a_kill_left_half_written_is_not_a_state(tmp_path):
    save_state(tmp_path, 10, {}, {"a": torch.zeros(1)})
    (tmp_path / ".step-00000020.partial-1-abc").mkdir()
    assert latest_state(tmp_path).name == "step-00000010"


def test_a_damaged_state_is_one_line(tmp_path):
    folder = save_state(tmp_path, 10, {}, {"a": torch.zeros(100)})
    (folder / "tensors").write_bytes((folder / "tensors").read_bytes()[:-9])
    with pytest.raises(ValueError, match="damaged training state"):
        load_state(folder)

import pytest
import torch

from smolseek.checkpoint.state import find_damage, load_state, newest_state, newest_whole_state, save_state


def names(checkpoints):
    return sorted(path.name for path in checkpoints.iterdir())


def test_the_newest_states_are_kept(tmp_path):
    assert newest_state(tmp_path / "checkpoints") is None and newest_whole_state(tmp_path / "checkpoints") is None
    for step in (8, 9, 10):
        save_state(tmp_path / "checkpoints", step, {"step": step}, {"a": torch.full((2,), step)}, keep_last=2)
    assert names(tmp_path / "checkpoints") == ["step-00000009", "step-00000010"]
    plain, tensors = load_state(newest_whole_state(tmp_path / "checkpoints"))
    assert plain == {"step": 10} and tensors["a"].tolist() == [10, 10]


def test_what_a_kill_left_half_written_is_not_a_state(tmp_path):
    save_state(tmp_path, 10, {}, {"a": torch.zeros(1)})
    (tmp_path / ".step-00000020.partial-1-abc").mkdir()
    assert newest_state(tmp_path).name == "step-00000010"
    save_state(tmp_path, 15, {}, {"a": torch.zeros(1)})
    assert names(tmp_path) == ["step-00000010", "step-00000015"]


def test_a_damaged_state_is_one_line(tmp_path):
    folder = save_state(tmp_path, 10, {}, {"a": torch.zeros(100)})
    assert find_damage(folder) is None
    (folder / "tensors").write_bytes((folder / "tensors").read_bytes()[:-9])
    assert find_damage(folder) == "tensors: not what was written"
    with pytest.raises(ValueError, match="damaged training state"):
        load_state(folder)
    with pytest.raises(ValueError, match=r"damaged training state step-00000010 \(tensors"):
        newest_whole_state(tmp_path)
    (folder / "state.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="damaged training state"):
        load_state(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a":' * 100_000, '{"../x": 3}', "\xff"])
def test_checksums_that_are_none_are_damage(text, tmp_path):
    folder = save_state(tmp_path, 10, {}, {"a": torch.zeros(1)})
    (folder / "checksums.json").write_bytes(text.encode("latin-1"))
    assert find_damage(folder) and "\n" not in find_damage(folder)


def test_a_state_written_after_a_damaged_one_replaces_it(tmp_path):
    """The state from before has a higher step; a resume after the next stop must not find it."""
    for step in (5, 10):
        save_state(tmp_path, step, {"step": step}, {})
    (tmp_path / "step-00000010" / "state.json").write_text("{")
    assert newest_whole_state(tmp_path).name == "step-00000005"
    save_state(tmp_path, 7, {"step": 7}, {})
    assert names(tmp_path) == ["step-00000005", "step-00000007"]

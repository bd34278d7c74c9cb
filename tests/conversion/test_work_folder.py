"""Finished parts survive an interruption, and only that."""

import pytest
import torch
from safetensors import SafetensorError

from smolseek.conversion import work_folder
from smolseek.conversion.work_folder import WorkFolder


def test_parts_are_found_again_after_an_interruption_only(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), WorkFolder(out, {"seed": 0}) as work:
        work.put("layer-0", {"w": torch.arange(3.0)}, {"error": 0.5})
        assert work.get("layer-1") is None
        raise KeyboardInterrupt
    with WorkFolder(out, {"seed": 0}) as work:
        part = work.get("layer-0")
        assert part is not None
        tensors, facts = part
        assert torch.equal(tensors["w"], torch.arange(3.0)) and facts == {"error": 0.5}
    assert not list(tmp_path.iterdir())


def test_other_inputs_start_afresh_and_leave_finished_work_alone(tmp_path, caplog):
    with pytest.raises(KeyboardInterrupt), WorkFolder(tmp_path / "out", {"seed": 0}) as work:
        work.put("layer-0", {}, {})
        raise KeyboardInterrupt
    with WorkFolder(tmp_path / "out", {"seed": 1}) as work:
        assert work.get("layer-0") is None
    assert "holds work of other settings" in caplog.text
    with WorkFolder(tmp_path / "out", {"seed": 0}) as work:
        assert work.get("layer-0") is not None


@pytest.mark.parametrize("error", [ValueError, OSError, MemoryError])
def test_finished_work_survives_every_error(error, tmp_path):
    with pytest.raises(error), WorkFolder(tmp_path / "out", {}) as work:
        raise error
    assert not list(tmp_path.iterdir())  # nothing was finished
    with pytest.raises(error), WorkFolder(tmp_path / "out", {}) as work:
        work.put("layer-0", {}, {})
        raise error
    with WorkFolder(tmp_path / "out", {}) as work:
        assert work.get("layer-0") is not None
    assert not list(tmp_path.iterdir())


def test_two_conversions_of_one_folder_at_once(tmp_path):
    with WorkFolder(tmp_path / "out", {}) as work:
        work.put("layer-0", {}, {})
        with pytest.raises(ValueError, match="another process is at work in it"), WorkFolder(tmp_path / "out", {}):
            pass
        assert work.get("layer-0") is not None


def test_half_a_part_is_no_part(tmp_path):
    with WorkFolder(tmp_path / "out", {}) as work:
        (work.path / "layer-0.partial").write_bytes(b"half")
        assert work.get("layer-0") is None


def test_a_damaged_part_is_made_again(tmp_path, caplog):
    with WorkFolder(tmp_path / "out", {}) as work:
        (work.path / "layer-0").write_bytes(b"")
        assert work.get("layer-0") is None and "is made again" in caplog.text


def test_a_full_disk_is_said_in_a_line(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(work_folder, "save_file", fail)
    with WorkFolder(tmp_path / "out", {}) as work, pytest.raises(OSError, match=r"layer-0.*free some space"):
        work.put("layer-0", {}, {})


def test_a_process_that_does_not_see_the_folder_says_so(tmp_path):
    work = WorkFolder(tmp_path / "out", {})  # nobody has made it here
    with pytest.raises(ValueError, match="process 0 does not see it; name a folder that all processes see"):
        work.check_seen()

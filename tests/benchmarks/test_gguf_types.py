"""The comparison of GGUF types on a tiny folder."""

import gguf_types
import llamacpp
import pytest

from tests.export.folders import tiny_folder
from tests.text import write_stories

try:
    llamacpp.shared_library()
except ImportError as missing:
    pytest.skip(str(missing), allow_module_level=True)


def test_every_type_has_a_row_and_f32_costs_nothing(tmp_path):
    tiny_folder(tmp_path / "m", hidden_size=64)
    text = write_stories(tmp_path / "text.txt")
    windows = gguf_types.windows_of(str(tmp_path / "m"), str(text), 3)
    assert [len(window) for window in windows] == [64, 64, 64]
    ours, costs = gguf_types.measure(str(tmp_path / "m"), windows)
    assert [cost.kind for cost in costs] == list(gguf_types.TYPES)
    by_kind = {cost.kind: cost for cost in costs}
    assert by_kind["f32"].largest < 1e-4 and by_kind["f32"].agreement == 1.0
    assert by_kind["f32"].loss == pytest.approx(ours, abs=1e-5)
    assert by_kind["f32"].kl < by_kind["f16"].kl < by_kind["q8_0"].kl
    assert by_kind["q8_0"].fallbacks > 0 and by_kind["q8_0"].size_bytes < by_kind["f16"].size_bytes
    sizes = [by_kind[kind].bits_per_weight for kind in ("q8_0", "q6_k", "q5_k_m", "q4_k_m")]
    assert (
        by_kind["q8_0"].kl <= by_kind["q6_k"].kl < by_kind["q4_k_m"].kl and sizes[0] == sizes[1] > sizes[2] > sizes[3]
    )
    assert len(gguf_types.table("m", 192, ours, costs)) == 14


def test_each_folder_needs_its_text():
    with pytest.raises(ValueError, match="2 folders and 1 texts"):
        gguf_types.report(gguf_types.Types(folders=("a", "b"), texts=("c",)))

"""The comparison of GGUF types on tiny folders."""

import gguf_types
import llamacpp
import pytest

from smolseek.checkpoint.hub import save
from smolseek.model import StockModel
from tests.export.folders import tiny_folder
from tests.factories import tiny_llama
from tests.text import ENTRIES, tiny_tokenizer, write_stories

try:
    llamacpp.shared_library()
except ImportError as missing:
    pytest.skip(str(missing), allow_module_level=True)


def settings(tmp_path, **fields):
    text = str(write_stories(tmp_path / "text.txt"))
    return gguf_types.Types(
        **{"folders": (str(tmp_path / "m"),), "texts": (text,), "windows": 3, "results": tmp_path / "out"} | fields
    )


def test_every_type_has_a_row_and_f32_costs_nothing(tmp_path):
    tiny_folder(tmp_path / "m", hidden_size=64)
    types = settings(tmp_path)
    rows = gguf_types.compare(types)
    assert [row["kind"] for row in rows.rows] == list(types.types)
    assert {row["tokens"] for row in rows.rows} == {3 * 64}
    by_kind = {row["kind"]: row for row in rows.rows}
    assert by_kind["f32"]["largest"] < 1e-4 and by_kind["f32"]["agreement"] == 1.0
    assert by_kind["f32"]["loss"] == pytest.approx(by_kind["f32"]["ours"], abs=1e-5)
    kl = [by_kind[kind]["kl"] for kind in ("f32", "f16", "q8_0", "q6_k", "q4_k_m")]
    assert kl[0] < kl[1] < kl[2] <= kl[3] < kl[4]
    assert by_kind["q8_0"]["fallbacks"] > 0 and by_kind["q8_0"]["size_bytes"] < by_kind["f16"]["size_bytes"]
    sizes = [by_kind[kind]["bits_per_weight"] for kind in ("q8_0", "q6_k", "q5_k_m", "q4_k_m")]
    assert sizes[0] == sizes[1] > sizes[2] > sizes[3]
    assert gguf_types.compare(types).rows == rows.rows  # nothing is measured twice
    said = gguf_types.report(types, rows, "command")
    assert "## m on text.txt" in said and all(f"| {kind} |" in said for kind in types.types)


def test_a_dense_folder_has_k_quants_too(tmp_path):
    """Its files are near, each type nearer than the next; rows of 256 take the type's own blocks."""
    llama = tiny_llama(vocab_size=ENTRIES, hidden_size=64, intermediate_size=256, max_position_embeddings=64)
    save(StockModel(llama), tmp_path / "m", tokenizer_from=tiny_tokenizer())
    rows = gguf_types.compare(settings(tmp_path, types=("f32", "q6_k", "q4_k_m"))).rows
    assert rows[0]["largest"] < 1e-4 and rows[0]["kl"] < rows[1]["kl"] < rows[2]["kl"] < 0.1
    assert rows[0]["fallbacks"] == 0 < rows[1]["fallbacks"] < rows[1]["tensors"]


def test_no_row_begins_after_the_time(tmp_path):
    tiny_folder(tmp_path / "m", hidden_size=64)
    assert gguf_types.compare(settings(tmp_path, minutes=0)).rows == []

"""The mixture of encodings in files of k-quants, and the encoder."""

import ctypes
import types

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Encoding
from gguf.quants import dequantize

from smolseek.export import kquants
from smolseek.export.kquants import BASES, mixed_encoding, quantise_rows, quantiser

CONFIG = {"num_hidden_layers": 30, "tie_word_embeddings": False, "n_routed_experts": 16}


def test_the_head_is_q6_k_and_embeddings_only_if_they_are_the_head():
    for kind, base in BASES.items():
        assert mixed_encoding(kind, "output.weight", CONFIG) == Encoding.Q6_K
        assert mixed_encoding(kind, "token_embd.weight", CONFIG) == base
        assert mixed_encoding(kind, "token_embd.weight", CONFIG | {"tie_word_embeddings": True}) == Encoding.Q6_K


@pytest.mark.parametrize("name", ["ffn_down", "ffn_down_exps", "ffn_down_shexp"])
def test_some_down_projections_are_q6_k(name):
    """The list is that of llama.cpp 0.5.0's own quantiser for 30 layers."""
    more = [
        layer for layer in range(30) if mixed_encoding("q4_k_m", f"blk.{layer}.{name}.weight", CONFIG) == Encoding.Q6_K
    ]
    assert more == [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 26, 27, 28, 29]
    assert mixed_encoding("q4_k_m", "blk.5.ffn_up.weight", CONFIG) == Encoding.Q4_K


def test_eight_experts_have_another_output_projection():
    for kind, experts, encoding in (
        ("q4_k_m", 8, Encoding.Q5_K),
        ("q4_k_m", 16, Encoding.Q4_K),
        ("q6_k", 8, Encoding.Q6_K),
    ):
        name = "blk.3.attn_output.weight"
        assert mixed_encoding(kind, name, CONFIG | {"n_routed_experts": experts}) == encoding


@pytest.mark.parametrize(("encoding", "most"), [(Encoding.Q4_K, 0.1), (Encoding.Q5_K, 0.05), (Encoding.Q6_K, 0.03)])
def test_blocks_read_back_are_near_the_numbers(encoding, most):
    pytest.importorskip("xllamacpp", reason="needs llama.cpp: pip install xllamacpp")
    numbers = np.random.default_rng(0).standard_normal((2, 3, 512)).astype(np.float32)
    again = dequantize(quantise_rows(numbers, encoding), encoding)
    assert again.shape == numbers.shape and np.sqrt(((again - numbers) ** 2).mean()) < most


def test_a_missing_or_another_library_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"xllamacpp: not installed, .*; pip install xllamacpp$"):
        quantiser()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: types.SimpleNamespace(origin=str(tmp_path / "a.py")))
    with pytest.raises(ValueError, match="no library of the expected name"):
        quantiser()
    monkeypatch.setattr(kquants, "library_path", lambda: None)
    monkeypatch.setattr(ctypes, "CDLL", lambda path: types.SimpleNamespace())
    with pytest.raises(ValueError, match="lacks llama"):
        quantiser()
    fake = types.SimpleNamespace(ggml_type_name=lambda number: b"q2_K", ggml_quantize_chunk=None)
    monkeypatch.setattr(ctypes, "CDLL", lambda path: fake)
    with pytest.raises(ValueError, match="numbers its encodings otherwise"):
        quantiser()

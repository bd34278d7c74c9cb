"""K-quants: which encoding each tensor gets in a file of such a type, and llama.cpp's own code that encodes it.

A k-quant packs 256 numbers of a row in one block. The package gguf reads these blocks but does not write them. So the
function `ggml_quantize_chunk` of llama.cpp's library does it, which takes no structs.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

_Q4_K, _Q5_K, _Q6_K = GGMLQuantizationType.Q4_K, GGMLQuantizationType.Q5_K, GGMLQuantizationType.Q6_K
BASES = {"q4_k_m": _Q4_K, "q5_k_m": _Q5_K, "q6_k": _Q6_K}
"""The encoding of most tensors in a file of each type."""
SUBSTITUTES = {_Q4_K: GGMLQuantizationType.Q5_0, _Q5_K: GGMLQuantizationType.Q5_1, _Q6_K: GGMLQuantizationType.Q8_0}
"""What llama.cpp takes where 256 does not divide the rows: blocks of 32."""
_NAMES = {_Q4_K: b"q4_K", _Q5_K: b"q5_K", _Q6_K: b"q6_K"}


def mixed_encoding(kind: str, name: str, config: dict[str, Any]) -> GGMLQuantizationType:
    """Returns the encoding that llama.cpp's quantiser gives a matrix of a deepseek2 file.

    The output head gets Q6_K, and so do the down projections of the first and last eighth of the layers and of every
    third layer between them. With exactly eight experts, q4_k_m has the output projection of attention in Q5_K.

    Args:
        kind: one of `BASES`.
        name: the tensor's name in the GGUF file.
        config: the model's, with its defaults filled in.
    """
    if name == ("token_embd.weight" if config["tie_word_embeddings"] else "output.weight"):
        return _Q6_K
    if down := re.match(r"blk\.(\d+)\.ffn_down", name):
        layer, layers = int(down[1]), config["num_hidden_layers"]
        if layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2:
            return _Q6_K
    if kind == "q4_k_m" and name.endswith("attn_output.weight") and config["n_routed_experts"] == 8:
        return _Q5_K
    return BASES[kind]


def library_path() -> Path:
    """Returns the path of llama.cpp's library in the package xllamacpp.

    Raises:
        ValueError: the package is not installed, or holds no library of the expected name.
    """
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        raise ValueError("xllamacpp: not installed, and llama.cpp's library is in it; pip install xllamacpp")
    path = next(Path(spec.origin).parent.glob("xllamacpp.*so"), None)
    if path is None:
        raise ValueError("xllamacpp: holds no library of the expected name; pip install 'xllamacpp>=2026.10,<2027'")
    return path


def quantiser() -> Callable[..., int]:
    """Returns llama.cpp's `ggml_quantize_chunk`.

    Raises:
        ValueError: as `library_path`, or the library lacks the function or numbers its encodings otherwise than gguf.
    """
    library = ctypes.CDLL(str(library_path()))
    try:
        name_of, quantise = library.ggml_type_name, library.ggml_quantize_chunk
    except AttributeError:
        raise ValueError("xllamacpp: lacks llama.cpp's quantiser; pip install 'xllamacpp>=2026.10,<2027'") from None
    name_of.restype, name_of.argtypes = ctypes.c_char_p, [ctypes.c_int]
    if any(name_of(int(encoding)) != name for encoding, name in _NAMES.items()):
        raise ValueError("xllamacpp: numbers its encodings otherwise; pip install 'xllamacpp>=2026.10,<2027'")
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    quantise.restype = ctypes.c_size_t
    quantise.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    return quantise


def quantise_rows(numbers: np.ndarray, encoding: GGMLQuantizationType) -> np.ndarray:
    """Returns the bytes of fp32 numbers as a k-quant; 256 must divide the length of their rows."""
    block, block_bytes = GGML_QUANT_SIZES[encoding]
    columns = numbers.shape[-1]
    encoded = np.empty((*numbers.shape[:-1], columns // block * block_bytes), np.uint8)
    rows = numbers.size // columns
    written = quantiser()(int(encoding), numbers.ctypes.data, encoded.ctypes.data, 0, rows, columns, None)
    assert written == encoded.nbytes, (written, encoded.nbytes)
    return encoded

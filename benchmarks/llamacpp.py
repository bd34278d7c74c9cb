"""llama.cpp's own logits, through the shared library in the xllamacpp wheel.

Structs are passed by value, as byte blocks larger than those of any version. Only the few fields that are set here need
known offsets; the library's default values show whether the offsets are still right.

Shapes: T tokens of one sequence, V vocab_size.
"""

from __future__ import annotations

import ctypes
import struct
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smolseek.export.kquants import library_path

_F32, _F16, _AUTO, _OFF = 0, 1, -1, 0
# Byte offsets of fields of llama_context_params, with their defaults.
_N_CTX, _N_BATCH, _N_UBATCH, _THREADS, _THREADS_BATCH, _FLASH, _TYPE_K, _TYPE_V = 0, 4, 8, 28, 32, 52, 104, 108
_DEFAULTS = {_N_CTX: 512, _N_BATCH: 2048, _N_UBATCH: 512, _THREADS: 4, _THREADS_BATCH: 4, _FLASH: _AUTO}
_DEFAULTS |= {_TYPE_K: _F16, _TYPE_V: _F16}


class _Blob(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_uint8 * 1024)]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_SAID: list[str] = []


@_LOG
def _note(_level: int, text: bytes, _data: Any) -> None:
    _SAID.append(text.decode(errors="replace"))


@cache
def shared_library() -> ctypes.CDLL:
    """Returns the library with its functions declared.

    Raises:
        ImportError: xllamacpp is not installed, or its structs have other offsets.
    """
    try:
        path = library_path()
    except ValueError as error:
        raise ImportError(str(error)) from None
    lib = ctypes.CDLL(str(path))
    pointer, number = ctypes.c_void_p, ctypes.c_int32
    for name, result, arguments in (
        ("llama_log_set", None, [_LOG, pointer]),
        ("llama_model_default_params", _Blob, []),
        ("llama_context_default_params", _Blob, []),
        ("llama_model_load_from_file", pointer, [ctypes.c_char_p, _Blob]),
        ("llama_init_from_model", pointer, [pointer, _Blob]),
        ("llama_model_get_vocab", pointer, [pointer]),
        ("llama_vocab_n_tokens", number, [pointer]),
        ("llama_tokenize", number, [pointer, ctypes.c_char_p, number, pointer, number, ctypes.c_bool, ctypes.c_bool]),
        ("llama_batch_init", _Batch, [number, number, number]),
        ("llama_batch_free", None, [_Batch]),
        ("llama_decode", number, [pointer, _Batch]),
        ("llama_get_logits", ctypes.POINTER(ctypes.c_float), [pointer]),
        ("llama_model_chat_template", ctypes.c_char_p, [pointer, ctypes.c_char_p]),
        ("llama_free", None, [pointer]),
        ("llama_model_free", None, [pointer]),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    defaults = bytes(lib.llama_context_default_params().bytes)
    if any(struct.unpack_from("<i", defaults, at)[0] != value for at, value in _DEFAULTS.items()):
        raise ImportError("xllamacpp: its llama_context_params is not as benchmarks/llamacpp.py knows it")
    return lib


class LlamaCpp:
    """A GGUF file loaded by llama.cpp on the CPU, with an fp32 cache; a context manager.

    Raises:
        ValueError: llama.cpp does not load the file; says what it said.
    """

    def __init__(self, path: Path, *, tokens: int = 512) -> None:
        self._lib, self._tokens = shared_library(), tokens
        _SAID.clear()
        self._lib.llama_log_set(_note, None)  # xllamacpp's own server redirects the log
        self._model = self._lib.llama_model_load_from_file(str(path).encode(), self._lib.llama_model_default_params())
        if not self._model:
            raise ValueError(f"{path}: llama.cpp does not load it: {''.join(_SAID[-6:])}")
        self._vocabulary = self._lib.llama_model_get_vocab(self._model)

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lib.llama_model_free(self._model)

    def logits(self, ids_T: Tensor) -> Tensor:
        """Returns the logits (T, V) after every token of one sequence."""
        assert len(ids_T) <= self._tokens
        settings = self._lib.llama_context_default_params()
        fields = {_N_CTX: self._tokens, _N_BATCH: self._tokens, _N_UBATCH: self._tokens}
        fields |= {_FLASH: _OFF, _TYPE_K: _F32, _TYPE_V: _F32}
        fields |= {_THREADS: 1, _THREADS_BATCH: 1}  # its threads wait in busy loops, for ever on a busy machine
        for at, value in fields.items():
            struct.pack_into("<i", settings, at, value)
        context = self._lib.llama_init_from_model(self._model, settings)
        assert context, "".join(_SAID[-6:])
        try:
            return self._decode(context, ids_T)
        finally:
            self._lib.llama_free(context)

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Returns llama.cpp's token ids; `special` adds BOS if the file says so and reads special tokens."""
        data = text.encode()
        room = (ctypes.c_int32 * (len(data) + 8))()
        count = self._lib.llama_tokenize(self._vocabulary, data, len(data), room, len(room), special, special)
        assert count >= 0
        return list(room[:count])

    def chat_template(self) -> str | None:
        """Returns the chat template in the file."""
        text = self._lib.llama_model_chat_template(self._model, None)
        return None if text is None else text.decode()

    def _decode(self, context: int, ids_T: Tensor) -> Tensor:
        count = len(ids_T)
        batch = self._lib.llama_batch_init(count, 0, 1)
        try:
            batch.n_tokens = count
            for at, token in enumerate(ids_T.tolist()):
                batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, at, 1
                batch.seq_id[at][0], batch.logits[at] = 0, 1
            if self._lib.llama_decode(context, batch) != 0:
                raise ValueError(f"llama.cpp does not decode: {''.join(_SAID[-6:])}")
            shape = (count, self._lib.llama_vocab_n_tokens(self._vocabulary))
            return torch.from_numpy(np.ctypeslib.as_array(self._lib.llama_get_logits(context), shape).copy())
        finally:
            self._lib.llama_batch_free(batch)

"""llama.cpp's own logits and decoding steps, through the shared library in the xllamacpp wheel.

Structs are passed by value, as byte blocks larger than those of any version. Only the few fields that are set here need
known offsets; the library's default values show whether the offsets are still right.

Shapes: B sequences, T tokens of one sequence, N tokens in one row, V vocab_size.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smolseek.export.kquants import library_path

_F32, _F16, _AUTO, _OFF, _ON = 0, 1, -1, 0, 1
# Byte offsets of fields of llama_context_params, with their defaults.
_N_CTX, _N_BATCH, _N_UBATCH, _N_SEQ, _THREADS, _THREADS_BATCH, _FLASH, _BETA_FAST, _BETA_SLOW, _TYPE_K, _TYPE_V = (
    0,
    4,
    8,
    12,
    28,
    32,
    52,
    72,
    76,
    104,
    108,
)
_DEFAULTS = {_N_CTX: 512, _N_BATCH: 2048, _N_UBATCH: 512, _N_SEQ: 1, _THREADS: 4, _THREADS_BATCH: 4, _FLASH: _AUTO}
_DEFAULTS |= {_BETA_FAST: -1.0, _BETA_SLOW: -1.0, _TYPE_K: _F16, _TYPE_V: _F16}


_BETAS = {"--yarn-beta-fast": _BETA_FAST, "--yarn-beta-slow": _BETA_SLOW}
"""Options of llama.cpp's commands for these fields."""


def _kind(value: float) -> str:
    """Returns how `struct` calls the type of a field with this value."""
    return "<f" if isinstance(value, float) else "<i"


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
        ("llama_n_seq_max", ctypes.c_uint32, [pointer]),
        ("llama_n_ctx_seq", ctypes.c_uint32, [pointer]),
        ("llama_get_memory", pointer, [pointer]),
        ("llama_memory_seq_cp", None, [pointer, number, number, number, number]),
        ("llama_memory_seq_rm", ctypes.c_bool, [pointer, number, number, number]),
        ("llama_free", None, [pointer]),
        ("llama_model_free", None, [pointer]),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    defaults = bytes(lib.llama_context_default_params().bytes)
    if any(struct.unpack_from(_kind(value), defaults, at)[0] != value for at, value in _DEFAULTS.items()):
        raise ImportError("xllamacpp: its llama_context_params is not as benchmarks/llamacpp.py knows it")
    return lib


class LlamaCpp:
    """A GGUF file loaded by llama.cpp on the CPU, with an fp32 cache; a context manager.

    `options` are those of llama.cpp's commands: --yarn-beta-fast and --yarn-beta-slow, each with its value.

    Raises:
        ValueError: llama.cpp does not load the file; says what it said.
    """

    def __init__(self, path: Path, *, tokens: int = 512, options: Sequence[str] = ()) -> None:
        self._lib, self._tokens = shared_library(), tokens
        self._own = {_BETAS[name]: float(value) for name, value in map(str.split, options)}
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
        fields = {_N_CTX: self._tokens, _N_BATCH: self._tokens, _N_UBATCH: self._tokens}
        fields |= {_FLASH: _OFF, _TYPE_K: _F32, _TYPE_V: _F32}
        fields |= {_THREADS: 1, _THREADS_BATCH: 1}  # its threads wait in busy loops, for ever on a busy machine
        context = self._context(fields)
        try:
            rows = [(token, at, 0) for at, token in enumerate(ids_T.tolist())]
            return self._decode(context, rows)
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

    def _context(self, fields: dict[int, float]) -> int:
        """Returns a new context in which these fields have other values than the defaults."""
        settings = self._lib.llama_context_default_params()
        for at, value in (self._own | fields).items():
            struct.pack_into(_kind(value), settings, at, value)
        context = self._lib.llama_init_from_model(self._model, settings)
        if not context:
            raise ValueError(f"llama.cpp makes no context: {''.join(_SAID[-6:])}")
        return int(context)

    def _decode(self, context: int, rows: list[tuple[int, int, int]], *, all_logits: bool = True) -> Tensor:
        """Returns the logits (N, V) after tokens given as (id, position, sequence); or none of them, (0, V)."""
        count = len(rows)
        batch = self._lib.llama_batch_init(count, 0, 1)
        try:
            batch.n_tokens = count
            for at, (token, position, sequence) in enumerate(rows):
                batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, position, 1
                batch.seq_id[at][0], batch.logits[at] = sequence, all_logits
            if self._lib.llama_decode(context, batch) != 0:
                raise ValueError(f"llama.cpp does not decode: {''.join(_SAID[-6:])}")
            if not all_logits:
                return torch.empty(0, self.entries)
            numbers = np.ctypeslib.as_array(self._lib.llama_get_logits(context), (count, self.entries))
            return torch.from_numpy(numbers.copy())
        finally:
            self._lib.llama_batch_free(batch)

    @property
    def entries(self) -> int:
        """The size of the vocabulary."""
        return int(self._lib.llama_vocab_n_tokens(self._vocabulary))


class Decoder:
    """Sequences of one model in llama.cpp, each with a cache of its own in f16, decoded one token at a time.

    A context manager. `fill` first, then `step`, and `rewind` to the filled length.

    Args:
        tokens: room of each sequence.
        sequences: most sequences at once.
        flash: with flash attention.

    Raises:
        ValueError: llama.cpp makes no such context.
    """

    PREFILL_TOKENS = 512

    def __init__(self, model: LlamaCpp, *, tokens: int, sequences: int, threads: int, flash: bool) -> None:
        self._model, self._lib, self._sequences, self._filled = model, shared_library(), sequences, 0
        room = -(-tokens // 256) * 256
        self._context = model._context(
            {_N_CTX: room * sequences, _N_SEQ: sequences, _FLASH: _ON if flash else _OFF}
            | {_THREADS: threads, _THREADS_BATCH: threads}
        )
        shape = (self._lib.llama_n_seq_max(self._context), self._lib.llama_n_ctx_seq(self._context))
        assert shape == (sequences, room), shape
        self._memory = self._lib.llama_get_memory(self._context)
        self._lengths = [0] * sequences

    def __enter__(self) -> Decoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lib.llama_free(self._context)

    def fill(self, count: int) -> None:
        """Reads random tokens until the first sequence has `count`, and copies its cache to the others."""
        self.rewind()
        draw = torch.Generator().manual_seed(count)
        for begin in range(self._filled, count, self.PREFILL_TOKENS):
            end = min(count, begin + self.PREFILL_TOKENS)
            ids = torch.randint(self._model.entries, (end - begin,), generator=draw).tolist()
            rows = [(token, begin + at, 0) for at, token in enumerate(ids)]
            self._model._decode(self._context, rows, all_logits=False)
        self._filled = count
        for sequence in range(1, self._sequences):
            self._lib.llama_memory_seq_rm(self._memory, sequence, -1, -1)
            self._lib.llama_memory_seq_cp(self._memory, 0, sequence, -1, -1)
        self._lengths = [count] * self._sequences

    def step(self, ids_B1: Tensor) -> Tensor:
        """Returns the likeliest next tokens (B, 1) of the first B sequences, each longer by one of `ids_B1`."""
        rows = [(token, self._lengths[at], at) for at, (token,) in enumerate(ids_B1.tolist())]
        logits_BV = self._model._decode(self._context, rows)
        for _, _, at in rows:
            self._lengths[at] += 1
        return logits_BV.argmax(-1, keepdim=True)

    def rewind(self) -> None:
        """Forgets what `step` added."""
        for sequence, length in enumerate(self._lengths):
            if length > self._filled:
                assert self._lib.llama_memory_seq_rm(self._memory, sequence, self._filled, -1)
        self._lengths = [self._filled] * self._sequences

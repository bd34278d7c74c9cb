"""Writes a safetensors file tensor by tensor, so that never more than one tensor of it is in memory.

Shapes: Z numbers, flattened.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

_DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The names that safetensors has for dtypes, in the order in which it writes their tensors."""
_COPIED_BYTES = 2**24
"""Bytes that are copied at once."""


class _Kept(NamedTuple):
    """A tensor that was written already: its dtype and shape, and the bytes that it has in the file of data."""

    dtype: torch.dtype
    shape: list[int]
    start: int
    stop: int


class ShardWriter:
    """Writes one safetensors file, with the bytes that safetensors' own writer gives it.

    The file begins with a table of its tensors. So they are first written one behind the other to a file beside it, and
    copied at the end.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.size = 0
        """Bytes of the tensors so far."""
        self._kept: dict[str, _Kept] = {}
        self._data = out.with_name(f"{out.name}.data")

    @property
    def names(self) -> list[str]:
        """The names of the tensors so far, sorted."""
        return sorted(self._kept)

    def add(self, name: str, tensor: Tensor) -> None:
        """Appends a tensor."""
        flat_Z = tensor.detach().cpu().contiguous().reshape(-1)
        start, self.size = self.size, self.size + flat_Z.numel() * flat_Z.element_size()
        self._kept[name] = _Kept(tensor.dtype, list(tensor.shape), start, self.size)
        with self._data.open("ab") as file:
            if flat_Z.numel():
                file.write(flat_Z.view(torch.uint8).numpy().data)

    def finish(self) -> None:
        """Writes the safetensors file."""
        ranks = list(_DTYPES)
        kept = sorted(self._kept.items(), key=lambda item: (ranks.index(item[1].dtype), item[0]))
        table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, (dtype, shape, start, stop) in kept:
            begin, end = end, end + stop - start
            table[name] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": [begin, end]}
        head = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
        head += b" " * (-len(head) % 8)
        with self._data.open("rb") as data, self.out.open("wb") as file:
            file.write(len(head).to_bytes(8, "little") + head)
            for _, (_, _, start, stop) in kept:
                data.seek(start)
                for at in range(start, stop, _COPIED_BYTES):
                    file.write(data.read(min(_COPIED_BYTES, stop - at)))
        self._data.unlink()

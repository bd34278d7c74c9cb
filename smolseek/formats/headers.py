"""Reads safetensors headers: the name, dtype and shape of every tensor. Imports no torch and no numpy."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FLOATS = ("F64", "F32", "F16", "BF16")
"""Dtypes of weights that are not quantised, as safetensors writes them."""
_LARGEST_HEADER_BYTES = 100_000_000  # safetensors' own limit


@dataclass(frozen=True)
class Header:
    """One tensor: the name of its file, its dtype as safetensors writes it (F32, BF16 ...), and its shape."""

    file: str
    dtype: str
    shape: tuple[int, ...]


def read_headers(folder: str | Path) -> dict[str, Header]:
    """Returns the header of every tensor by name, from a single file or from all shards in the index.

    Raises:
        ValueError: there are no safetensors (pickle is refused); a file is missing, has another size than its header
            says or is no safetensors file; or the index names a tensor that its file does not hold.
    """
    folder = Path(folder)
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        weight_map = _weight_map(index)
        read = {file: _read_file(folder / file) for file in sorted(set(weight_map.values()))}
        for name, file in weight_map.items():
            if name not in read[file]:
                raise ValueError(f"{folder / file}: holds no tensor {name}, which the index says; fetch both again")
        return {name: read[file][name] for name, file in weight_map.items()}
    if single.is_file():
        return _read_file(single)
    if list(folder.glob("*.bin")) or list(folder.glob("*.pt*")):
        raise ValueError(f"checkpoint {folder}: only pickle weights; re-save it with safe_serialization=True")
    raise ValueError(f"checkpoint {folder}: no model.safetensors; fetch the weights")


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index}: is no index of shards ({error!r}); fetch the file again") from error


def _read_file(path: Path) -> dict[str, Header]:
    """Returns the headers of one file, which is 8 bytes of length, a JSON header, and the numbers up to the file's end.

    `safetensors.safe_open` is not used: it imports numpy, and does not say the size that a cut file should have.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length) if length <= _LARGEST_HEADER_BYTES else b""
        tree: dict[str, Any] = json.loads(text)
        tree.pop("__metadata__", None)
        headers = {name: Header(path.name, entry["dtype"], tuple(entry["shape"])) for name, entry in tree.items()}
        end = 8 + length + max((entry["data_offsets"][1] for entry in tree.values()), default=0)
        size = path.stat().st_size
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: cannot be read ({error!r}); fetch the file again") from error
    if size != end:
        raise ValueError(f"{path}: cannot be read ({size:,} bytes where its header says {end:,}); fetch the file again")
    return headers

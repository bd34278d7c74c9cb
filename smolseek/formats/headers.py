"""Reads safetensors headers: the name, dtype and shape of every tensor. Imports no torch and no numpy."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smolseek.formats.foreign import check_no_pointer, describe_foreign

FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Dtypes of weights that are not quantised, as safetensors writes them and by torch's names."""
_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
"""Bits of a number, by safetensors' name of its dtype."""
_LARGEST_HEADER_BYTES = 100_000_000  # safetensors' own limit
_LARGEST_COUNT = 2**63  # of a tensor's numbers
_SHARD_NAME = re.compile(r"[^/\\\0]+\.safetensors")


@dataclass(frozen=True)
class Header:
    """One tensor: the name of its file, its dtype as safetensors writes it (F32, BF16 ...), and its shape."""

    file: str
    dtype: str
    shape: tuple[int, ...]


def read_headers(folder: str | Path) -> dict[str, Header]:
    """Returns the header of every tensor by name, as transformers finds them.

    These are those of model.safetensors if it is there, else those of all shards that the index names.

    Raises:
        ValueError: there are no safetensors (pickle is refused); a file is missing, a Git LFS pointer, has another size
            than its header says or is no safetensors file; or the index names a tensor that its file does not hold, or
            a file that does not lie beside it.
    """
    folder = Path(folder)
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.is_file():
        return _read_file(single)
    if index.is_file():
        return _read_shards(folder, _weight_map(index))
    if foreign := describe_foreign(folder):
        raise ValueError(f"checkpoint {folder}: {foreign}")
    if list(folder.glob("*.bin")) or list(folder.glob("*.pt*")):
        raise ValueError(f"checkpoint {folder}: only pickle weights; re-save it with safe_serialization=True")
    raise ValueError(
        f"checkpoint {folder}: no model.safetensors; fetch the weights, or, if there are only pickle "
        "files where it comes from, re-save it with safe_serialization=True"
    )


def float_dtype(headers: Mapping[str, Header]) -> str:
    """Returns the dtype of a checkpoint whose config.json names none, by torch's name; float32 if it has no floats.

    It is that of the first floating tensor by file and name, as transformers chooses with dtype="auto".
    """
    floats = {(header.file, name): header.dtype for name, header in headers.items() if header.dtype in FLOATS}
    return FLOATS[floats[min(floats)]] if floats else "float32"


def _read_shards(folder: Path, weight_map: Mapping[str, str]) -> dict[str, Header]:
    """Returns the headers of all tensors in the files of an index, also of those that it leaves out."""
    headers: dict[str, Header] = {}
    for file in sorted(set(weight_map.values())):
        shard = _read_file(folder / file)
        if twice := sorted(headers.keys() & shard.keys()):
            other = headers[twice[0]].file
            raise ValueError(f"{folder / file}: tensor {twice[0]} is in {other} too; fetch the checkpoint again")
        headers |= shard
    for name, file in weight_map.items():
        if name not in headers or headers[name].file != file:
            raise ValueError(f"{folder / file}: holds no tensor {name}, which the index says; fetch both again")
    return headers


def _weight_map(index: Path) -> dict[str, str]:
    check_no_pointer(index)
    try:
        weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{index}: is no index of shards ({_reason(error)}); fetch the file again") from error
    for file in weight_map.values():
        if not isinstance(file, str) or not _SHARD_NAME.fullmatch(file):
            raise ValueError(f"{index}: {file!r} is no .safetensors file beside the index; fetch the file again")
    return weight_map


def _read_file(path: Path) -> dict[str, Header]:
    """Returns the headers of one file, which is 8 bytes of length, a JSON header, and the numbers up to the file's end.

    `safetensors.safe_open` is not used: it imports numpy, and does not say the size that a cut file should have.
    """
    check_no_pointer(path)
    try:
        if not path.is_file():
            raise ValueError("no such file")
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(_LARGEST_HEADER_BYTES, size - 8):
                raise ValueError(f"a header of {length:,} bytes in {size:,}")
            tree = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_without_duplicates)
        if not isinstance(tree, dict):
            raise ValueError("its header is no JSON object")
        _check_metadata(tree.pop("__metadata__", None))
        headers, spans = {}, []
        for name, entry in tree.items():
            headers[name] = Header(path.name, entry["dtype"], tuple(entry["shape"]))
            spans.append((*_span(name, entry), name))
        end = 8 + length + _end_of(spans)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read ({_reason(error)}); fetch the file again") from error
    if size != end:
        raise ValueError(f"{path}: cannot be read ({size:,} bytes where its header says {end:,}); fetch the file again")
    return headers


def _reason(error: Exception) -> str:
    """Returns an error in a few words; its kind too, unless it is one of ours."""
    return f"{'' if type(error) is ValueError else type(error).__name__ + ': '}{error}"[:200]


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns a JSON object; raises ValueError if it has a name twice."""
    tree = dict(pairs)
    if len(tree) != len(pairs):
        raise ValueError("a name appears twice in its header")
    return tree


def _check_metadata(metadata: Any) -> None:
    """Raises ValueError if the notes in a header are not texts by name."""
    if metadata is not None and not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("__metadata__ is not made of texts")


def _span(name: str, entry: Mapping[str, Any]) -> tuple[int, int]:
    """Returns where a tensor's numbers begin and end, in bytes; raises ValueError if its dtype and shape do not fit."""
    (begin, end), dtype = entry["data_offsets"], entry["dtype"]
    bits = _BITS.get(dtype)
    if bits is None:
        raise ValueError(f"tensor {name}: dtype {dtype!r} is none of safetensors'")
    for number in (begin, end, *entry["shape"]):
        if type(number) is not int or not 0 <= number < _LARGEST_COUNT:
            raise ValueError(f"tensor {name}: {number!r} is no size")
    for width in entry["shape"]:
        bits *= width
        if bits >= _LARGEST_COUNT:
            raise ValueError(f"tensor {name}: its shape is too large")
    if bits % 8 or end - begin != bits // 8:
        raise ValueError(f"tensor {name}: {end - begin:,} bytes do not hold {dtype} {tuple(entry['shape'])}")
    return begin, end


def _end_of(spans: list[tuple[int, int, str]]) -> int:
    """Returns where the last tensor ends; raises ValueError unless each one begins where the one before it ends."""
    end = 0
    for begin, next_end, name in sorted(spans):
        if begin != end:
            raise ValueError(f"tensor {name}: begins at byte {begin:,} where the one before it ends at {end:,}")
        end = next_end
    return end

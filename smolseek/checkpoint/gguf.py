"""A dense model's GGUF file as an ordinary Hugging Face folder, written once into a cache."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock
from gguf import dequantize
from gguf.gguf_reader import ReaderTensor
from huggingface_hub import constants
from torch import Tensor

from smolseek.checkpoint.atomic import LOCK, check_space, remove_leftovers
from smolseek.checkpoint.folder import FolderWriter, written_bytes
from smolseek.formats.gguf_source import GgufSource, read_gguf
from smolseek.formats.gguf_tokenizer import tokenizer_files
from smolseek.formats.refusing import refusing

log = logging.getLogger(__name__)

_EDITION = 1
"""To be raised when the same file becomes another folder, so that no older one is taken for it."""
_LICENCE = {
    "license": "general.license",
    "license_name": "general.license.name",
    "license_link": "general.license.link",
}


def unpack(path: Path) -> Path:
    """Returns a folder with a GGUF file's model and tokenizer, from the cache if it was written before.

    The cache is `assets/smolseek/gguf` where the hub's downloads lie. A folder in it belongs to one path, size and time
    of change, so a file that was replaced is read again. Only one tensor is dequantised at a time. Other processes that
    want a folder wait until it is whole.

    Raises:
        ValueError: as `read_gguf` and `tokenizer_files` do; a tensor is of a type that is not read, or not finite; or
            the disk has too little room.
    """
    folder = _cached(path)
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / LOCK):
            if not folder.is_dir():
                remove_leftovers(folder.parent)
                _write(path, folder)
                log.warning("%s: its weights and tokenizer are kept in %s, which may be removed", path, folder)
    return folder


def _cached(path: Path) -> Path:
    """Returns where the folder of a file is, or will be."""
    path = path.resolve()
    facts = [str(path), path.stat().st_size, path.stat().st_mtime_ns, _EDITION]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    return Path(constants.HF_ASSETS_CACHE) / "smolseek" / "gguf" / f"{path.stem[:100]}-{digest}"


def _write(path: Path, folder: Path) -> None:
    source = read_gguf(path)
    with refusing(f"{path}: its tokenizer is not read"):
        files = tokenizer_files(source.keys, source.dense.vocab_size)
    _check_tokenizer(path, files["tokenizer.json"])
    dtype = getattr(torch, source.dense.dtype)
    remedy = "for the weights of the GGUF file; free some space, or set HF_HOME to a folder on another disk"
    check_space(folder.parent, written_bytes(source.dense.parameters() * dtype.itemsize), remedy)
    with FolderWriter(folder) as writer:
        for name, tree in ({"config.json": source.config} | files).items():
            writer.write_json(name, tree)
        if card := _card(source.keys):
            writer.write_text("README.md", card)
        for name, tensor in source.tensors.items():
            writer.add(name, _weights(path, source, name, tensor, dtype))


def _check_tokenizer(path: Path, tree: Mapping[str, Any]) -> None:
    from tokenizers import Tokenizer

    with refusing(f"{path}: its tokenizer is broken; fetch the file again"):
        Tokenizer.from_str(json.dumps(tree))


def _card(keys: Mapping[str, Any]) -> str:
    """Returns a card with the licence that the file names; empty if it names none."""
    front = {name: keys[key] for name, key in _LICENCE.items() if isinstance(keys.get(key), str)}
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n" if front else ""


def _weights(path: Path, source: GgufSource, name: str, tensor: ReaderTensor, dtype: torch.dtype) -> Tensor:
    """Returns one tensor in Hugging Face's order of rows.

    llama.cpp rotates rows 2i and 2i + 1 of a head together, transformers rows i and i + half of a head.
    """
    with refusing(f"{path}: tensor {tensor.name}: type {tensor.tensor_type.name} is not read; name another file"):
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).to(dtype)
    if not torch.isfinite(weight).all():
        raise ValueError(f"{path}: tensor {tensor.name}: holds NaN, infinity or what {dtype} cannot; fetch it again")
    if heads := source.paired_heads(name):
        weight = weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
    return weight

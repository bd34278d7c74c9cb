"""Headers of safetensors files: read from one file or several, and refused when broken."""

import json

import pytest
import torch
from safetensors.torch import save_file

from smolseek.checkpoint.folder import FolderWriter
from smolseek.formats.headers import Header, read_headers

TENSORS = {"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}
HEADERS = {"a": Header("model.safetensors", "F32", (2, 3)), "b": Header("model.safetensors", "BF16", (4,))}


def test_one_file(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert read_headers(tmp_path) == HEADERS


def test_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("smolseek.checkpoint.folder._MAX_SHARD_BYTES", 24)
    with FolderWriter(tmp_path / "out") as writer:
        for name, tensor in TENSORS.items():
            writer.add(name, tensor)
    headers = read_headers(tmp_path / "out")
    assert {name: (header.dtype, header.shape) for name, header in headers.items()} == {
        name: (header.dtype, header.shape) for name, header in HEADERS.items()
    }
    assert len({header.file for header in headers.values()}) == 2


def test_broken_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no model\.safetensors"):
        read_headers(tmp_path)
    path = tmp_path / "model.safetensors"
    for text, said in (
        (b"", "cannot be read"),
        (b"\xff" * 64, "cannot be read"),
        (b"\x02" + b"\0" * 7 + b"[]", "cannot"),
    ):
        path.write_bytes(text)
        with pytest.raises(ValueError, match=said):
            read_headers(tmp_path)
    save_file(TENSORS, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="bytes where its header says"):
        read_headers(tmp_path)


def test_an_index_that_lies_is_refused(tmp_path):
    save_file(TENSORS, tmp_path / "shard.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "shard.safetensors", "c": "shard.safetensors"}}))
    with pytest.raises(ValueError, match="holds no tensor c"):
        read_headers(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(ValueError, match=r"gone\.safetensors: cannot be read"):
        read_headers(tmp_path)
    index.write_text("[]")
    with pytest.raises(ValueError, match="no index of shards"):
        read_headers(tmp_path)

"""A file written tensor by tensor is the file that safetensors writes."""

import pytest
import torch
from safetensors.torch import save_file

from smolseek.checkpoint import shard
from smolseek.checkpoint.shard import _DTYPES, ShardWriter


@pytest.mark.parametrize("copied_bytes", [5, 2**24])
def test_the_bytes_are_those_of_safetensors(tmp_path, monkeypatch, copied_bytes):
    monkeypatch.setattr(shard, "_COPIED_BYTES", copied_bytes)
    tensors = {}
    for number, dtype in enumerate(reversed(_DTYPES)):
        tensors[f"b{number}"] = torch.arange(6).view(2, 3).to(dtype)
        tensors[f'A{number}é"\\'] = torch.ones((), dtype=dtype)
    tensors |= {"none": torch.zeros(0, 4), "turned": torch.arange(6.0).view(2, 3).t().contiguous()}
    writer = ShardWriter(tmp_path / "ours")
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.finish()
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "theirs"]
    assert writer.names == sorted(tensors) and writer.size == sum(t.nbytes for t in tensors.values())

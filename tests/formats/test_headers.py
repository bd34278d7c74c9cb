"""Headers of safetensors files: read from one file or several, and refused when broken."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from smolseek.checkpoint.folder import FolderWriter
from smolseek.formats.headers import Header, float_dtype, read_headers

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


def test_the_dtype_is_that_of_the_first_floats():
    """transformers reads the first file, and safetensors names its tensors in order."""
    headers = {
        "c": Header("2.safetensors", "F16", (1,)),
        "a": Header("2.safetensors", "F32", (1,)),
        "z": Header("1.safetensors", "F64", (1,)),
        "x": Header("1.safetensors", "BF16", (1,)),
        "b": Header("1.safetensors", "F8_E4M3", (1,)),
    }
    assert float_dtype(headers) == "bfloat16"
    assert float_dtype({name: headers[name] for name in "ac"}) == "float32"
    assert float_dtype({name: headers[name] for name in "b"}) == float_dtype({}) == "float32"


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


def write_file(path, header, numbers=b""):
    """Writes a safetensors file of a header (a tree, or JSON as bytes) and the bytes behind it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + numbers)


def entry(begin, end, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


BROKEN_HEADERS = {
    "overlap": ({"a": entry(0, 4), "b": entry(0, 4)}, 4, "tensor b: begins at byte 0"),
    "hole": ({"a": entry(0, 4), "b": entry(8, 12)}, 12, "tensor b: begins at byte 8"),
    "rest": ({"a": entry(0, 4)}, 8, "bytes where its header says"),
    "backwards": ({"a": entry(4, 0)}, 4, "-4 bytes do not hold F32"),
    "shape": ({"a": entry(0, 4, [2])}, 4, r"4 bytes do not hold F32 \(2,\)"),
    "negative": ({"a": entry(0, 4, [-1, -1])}, 4, "-1 is no size"),
    "huge": ({"a": entry(0, 4, [2**62, 2**62])}, 4, "its shape is too large"),
    "huge number": ({"a": entry(0, 4, [10**40])}, 4, "is no size"),
    "huge but empty": ({"a": entry(0, 0, [2**62, 4, 0])}, 0, "its shape is too large"),
    "half a number": ({"a": entry(0, 4.0)}, 4, "4.0 is no size"),
    "true": ({"a": entry(0, 4, [True])}, 4, "True is no size"),
    "dtype": ({"a": entry(0, 4, dtype="F128")}, 4, "dtype 'F128' is none of safetensors'"),
    "dtype list": ({"a": entry(0, 4, dtype=["F32"])}, 4, "unhashable"),
    "twice": (b'{"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, "a": 1}', 0, "appears twice"),
    "metadata": ({"__metadata__": {"a": 1}}, 0, "__metadata__"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [1]}}, 4, "data_offsets"),
    "deep": (b"[" * 100_000, 0, "RecursionError"),
    "utf-16": ("{}".encode("utf-16"), 0, "UnicodeDecodeError"),
    "list": (b"[]", 0, "no JSON object"),
}


@pytest.mark.parametrize("case", BROKEN_HEADERS)
def test_a_header_that_lies_is_refused_in_one_line(case, tmp_path):
    header, size, said = BROKEN_HEADERS[case]
    write_file(tmp_path / "model.safetensors", header, bytes(size))
    with pytest.raises(ValueError, match=said) as refusal:
        read_headers(tmp_path)
    assert "\n" not in str(refusal.value) and "model.safetensors: cannot be read" in str(refusal.value)
    assert len(str(refusal.value)) < 600


def test_a_length_that_the_file_does_not_have_is_not_read(tmp_path):
    for length in (2**63, 99_999_999):
        (tmp_path / "model.safetensors").write_bytes(length.to_bytes(8, "little") + b"{}")
        with pytest.raises(ValueError, match=f"a header of {length:,} bytes in 10"):
            read_headers(tmp_path)


def test_headers_that_safetensors_reads_are_read(tmp_path):
    tree = {"b": entry(4, 8), "a": entry(0, 4), "none": entry(8, 8, [0, 3]), "__metadata__": None}
    write_file(
        tmp_path / "model.safetensors", b"  " + json.dumps(tree | {"f": entry(8, 10, [4], "F4")}).encode(), bytes(10)
    )
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert set(read_headers(tmp_path)) == set(file.keys()) == {"a", "b", "none", "f"}


def test_an_old_index_beside_a_single_file_is_not_read(tmp_path):
    """transformers loads model.safetensors then, too."""
    save_file(TENSORS, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    assert read_headers(tmp_path) == HEADERS


def test_tensors_that_the_index_leaves_out_are_read(tmp_path):
    """transformers reads whole shards."""
    save_file(TENSORS, tmp_path / "shard.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "shard.safetensors"}}))
    assert set(read_headers(tmp_path)) == {"a", "b"}


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    for file in ("1.safetensors", "2.safetensors"):
        save_file(TENSORS, tmp_path / file)
    index = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"2\.safetensors: tensor a is in 1\.safetensors too"):
        read_headers(tmp_path)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/x.safetensors", "sub/x.safetensors", "..\\x.safetensors", "x.bin", 7]
)
def test_shards_lie_beside_the_index(name, tmp_path):
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    for place in (tmp_path, folder / "sub"):
        save_file(TENSORS, place / "x.safetensors")
    name = str(tmp_path / "x.safetensors") if name == "/x.safetensors" else name
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match=r"is no \.safetensors file beside the index") as refusal:
        read_headers(folder)
    assert "\n" not in str(refusal.value)

"""Damage to files. The repr of a change is Python that makes it again."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import yaml


class Missing:
    """In place of a value: the entry is removed."""

    def __repr__(self) -> str:
        return "MISSING"


MISSING = Missing()
Keys = tuple[str | int, ...]


def read_tree(path: Path) -> Any:
    """Returns what a JSON, JSON Lines (as a list) or YAML file holds."""
    text = path.read_text()
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines()]
    return yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)


def write_tree(path: Path, tree: Any) -> None:
    if path.suffix == ".jsonl" and isinstance(tree, list):
        path.write_text("".join(json.dumps(line) + "\n" for line in tree))
    else:
        path.write_text(yaml.safe_dump(tree) if path.suffix == ".yaml" else json.dumps(tree))


def set_in(tree: Any, keys: Keys, value: Any) -> Any:
    """Returns a tree with another value under `keys`; unchanged if there is no such place any more."""
    if not keys:
        return {} if value is MISSING else value
    *way, last = keys
    place = tree
    for key in way:
        place = place.get(key) if isinstance(place, dict) else _item(place, key)
    if isinstance(place, dict):
        place.pop(last, None)
        if value is not MISSING:
            place[last] = value
    elif isinstance(place, list) and isinstance(last, int) and last < len(place):
        place[last : last + 1] = [] if value is MISSING else [value]
    return tree


def _item(place: Any, key: str | int) -> Any:
    return place[key] if isinstance(place, list) and isinstance(key, int) and key < len(place) else None


@dataclass(frozen=True)
class Edit:
    """Another value in a JSON, JSON Lines or YAML file."""

    file: str
    keys: Keys
    value: Any

    def apply(self, root: Path) -> None:
        path = root / self.file
        write_tree(path, set_in(read_tree(path), self.keys, self.value))


@dataclass(frozen=True)
class Write:
    """Another content."""

    file: str
    content: bytes

    def apply(self, root: Path) -> None:
        (root / self.file).write_bytes(self.content)


@dataclass(frozen=True)
class Repeat:
    """Another content, which is one piece many times."""

    file: str
    piece: bytes
    times: int

    def apply(self, root: Path) -> None:
        (root / self.file).write_bytes(self.piece * self.times)


@dataclass(frozen=True)
class Recode:
    """The file's text in another encoding, behind a mark."""

    file: str
    encoding: str
    mark: bytes = b""

    def apply(self, root: Path) -> None:
        path = root / self.file
        path.write_bytes(self.mark + path.read_bytes().decode("utf-8", "replace").encode(self.encoding, "replace"))


@dataclass(frozen=True)
class Cut:
    """Only the beginning of a file."""

    file: str
    share: float

    def apply(self, root: Path) -> None:
        content = (root / self.file).read_bytes()
        (root / self.file).write_bytes(content[: int(len(content) * self.share)])


def _overwrite(path: Path, place: int, new: bytes) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:place] + new + content[place + len(new) :])


@dataclass(frozen=True)
class Splice:
    """Bytes in place of those at one point of a file, a share of its length."""

    file: str
    share: float
    content: bytes

    def apply(self, root: Path) -> None:
        content = (root / self.file).read_bytes()
        _overwrite(root / self.file, int(len(content) * self.share), self.content)


@dataclass(frozen=True)
class SpliceBehind:
    """Bytes in place of those that begin `skip` bytes behind the first `mark` in a file."""

    file: str
    mark: bytes
    skip: int
    content: bytes

    def apply(self, root: Path) -> None:
        content = (root / self.file).read_bytes()
        _overwrite(root / self.file, content.index(self.mark) + len(self.mark) + self.skip, self.content)


@dataclass(frozen=True)
class Append:
    """More bytes at the end of a file."""

    file: str
    content: bytes

    def apply(self, root: Path) -> None:
        with (root / self.file).open("ab") as file:
            file.write(self.content)


@dataclass(frozen=True)
class Remove:
    """A file that is not there."""

    file: str

    def apply(self, root: Path) -> None:
        (root / self.file).unlink(missing_ok=True)


@dataclass(frozen=True)
class MakeFolder:
    """A folder in place of a file."""

    file: str

    def apply(self, root: Path) -> None:
        (root / self.file).unlink(missing_ok=True)
        (root / self.file).mkdir()


@dataclass(frozen=True)
class Copy:
    """Another file in its place."""

    source: str
    file: str

    def apply(self, root: Path) -> None:
        shutil.copyfile(root / self.source, root / self.file)


def read_header(path: Path) -> dict[str, Any]:
    """Returns the header of a safetensors file."""
    content = path.read_bytes()
    header: dict[str, Any] = json.loads(content[8 : _end_of_header(content)])
    return header


def _end_of_header(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


def _write_header(path: Path, header: bytes) -> None:
    content = path.read_bytes()
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[_end_of_header(content) :])


@dataclass(frozen=True)
class EditHeader:
    """Another value in the header of a safetensors file, whose numbers stay."""

    file: str
    keys: Keys
    value: Any

    def apply(self, root: Path) -> None:
        header = set_in(read_header(root / self.file), self.keys, self.value)
        _write_header(root / self.file, json.dumps(header).encode())


@dataclass(frozen=True)
class RepeatName:
    """A safetensors header that names its last tensor twice."""

    file: str

    def apply(self, root: Path) -> None:
        header = read_header(root / self.file)
        name, entry = [*header.items()][-1]
        again = f", {json.dumps(name)}: {json.dumps(entry)}}}"
        _write_header(root / self.file, json.dumps(header)[:-1].encode() + again.encode())


@dataclass(frozen=True)
class FillNumbers:
    """The same four bytes for all the numbers of a safetensors file."""

    file: str
    word: bytes

    def apply(self, root: Path) -> None:
        content = (root / self.file).read_bytes()
        end = _end_of_header(content)
        (root / self.file).write_bytes(content[:end] + self.word * ((len(content) - end) // 4))


@dataclass(frozen=True)
class Shard:
    """An index of `names` in turn, and the weights in `shard`; with `beside` also where they were before."""

    folder: str
    shard: str
    names: tuple[Any, ...]
    beside: bool

    def apply(self, root: Path) -> None:
        folder = root / self.folder
        single = folder / "model.safetensors"
        tensors = [name for name in read_header(single) if name != "__metadata__"]
        weight_map = {tensor: self.names[i % len(self.names)] for i, tensor in enumerate(tensors)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        content = single.read_bytes()
        if not self.beside:
            single.unlink()
        (folder / self.shard).write_bytes(content)


@dataclass(frozen=True)
class Parquet:
    """A Parquet file with one column."""

    file: str
    column: str
    kind: str
    values: tuple[Any, ...]

    def apply(self, root: Path) -> None:
        kind = getattr(pyarrow, self.kind)()
        table = pyarrow.table({self.column: pyarrow.array(self.values, kind)})
        pyarrow.parquet.write_table(table, root / self.file)

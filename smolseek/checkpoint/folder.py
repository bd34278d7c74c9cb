"""Safetensors folders: read one tensor at a time, and written so that they are complete or absent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from smolseek.checkpoint.atomic import atomic_folder
from smolseek.checkpoint.licence import licence_files
from smolseek.checkpoint.shard import ShardWriter
from smolseek.formats.files import LICENCE_FILES, TOKENIZER_FILES
from smolseek.formats.headers import FLOATS, Header, read_headers

_MAX_SHARD_BYTES = 2 * 2**30


class TensorFolder:
    """The tensors of a safetensors checkpoint, in one file or in shards; a tensor is read when it is asked for.

    Raises:
        ValueError: as `read_headers` does, or a name is unknown.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.headers = read_headers(self.folder)

    def names(self) -> list[str]:
        """Returns all tensor names, sorted."""
        return sorted(self.headers)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor, from the header."""
        return self._header(name).shape

    def dtype(self, name: str) -> str:
        """Returns the dtype of a tensor as safetensors writes it (F32, BF16 ...), from the header."""
        return self._header(name).dtype

    def get(self, name: str, bounds: tuple[slice, ...] | None = None) -> Tensor:
        """Reads one tensor, in the dtype on disk; with `bounds`, a slice per dimension, that part of it alone."""
        path = self.folder / self._header(name).file
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_slice(name)[bounds] if bounds else file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: tensor {name}: cannot be read ({error}); fetch the file again") from error

    def has_own_head(self) -> bool:
        """Returns whether the head differs from the embeddings; transformers then unties the two, whatever config says.

        A dtype of its own does not make the head another one if all its numbers are equal.

        Raises:
            ValueError: one of the two is quantised.
        """
        names = ("lm_head.weight", "model.embed_tokens.weight")
        if not all(name in self.headers for name in names):
            return False
        for name in names:
            self.check_float(name)
        shapes = [self.shape(name) for name in names]
        return shapes[0] != shapes[1] or not all(self._equal_rows(*names, rows) for rows in _row_blocks(*shapes[0]))

    def _equal_rows(self, one: str, other: str, rows: slice) -> bool:
        """Returns whether two matrices have the same numbers in some rows."""
        ours, theirs = (self.get(name, (rows, slice(None))) for name in (one, other))
        return torch.equal(ours, theirs) if ours.dtype == theirs.dtype else torch.equal(ours.float(), theirs.float())

    def check_float(self, name: str) -> None:
        """Checks that a tensor is not quantised.

        Raises:
            ValueError: it is.
        """
        if self.dtype(name) not in FLOATS:
            raise ValueError(
                f"tensor {name}: dtype {self.dtype(name)} is quantised; name the checkpoint it was made from"
            )

    def _header(self, name: str) -> Header:
        if name not in self.headers:
            raise ValueError(f"checkpoint {self.folder}: no tensor {name}; the weights do not fit its config.json")
        return self.headers[name]


def _row_blocks(rows: int, columns: int) -> list[slice]:
    """Returns slices of the rows of a matrix, each of about a million numbers."""
    step = max(1, 2**20 // max(1, columns))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def written_bytes(weights_bytes: int) -> int:
    """Returns the most bytes that a `FolderWriter` takes on disk for weights of that size: its last file twice."""
    return weights_bytes + min(weights_bytes, _MAX_SHARD_BYTES)


def foreign_files(folder: Path) -> list[str]:
    """Returns the names in a folder that no checkpoint folder of ours has."""
    known = ["config.json", "conversion.json", "generation_config.json", "README.md", *TOKENIZER_FILES, *LICENCE_FILES]
    known += ["model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"]
    patterns = {pattern.partition("/")[0] for pattern in known}
    return sorted(path.name for path in folder.iterdir() if not any(fnmatch(path.name, p) for p in patterns))


class FolderWriter(AbstractContextManager["FolderWriter"]):
    """Writes a checkpoint folder tensor by tensor, in shards; the folder is complete or absent.

    Raises:
        ValueError: the folder exists and `force` is not set.
    """

    def __init__(self, out: str | Path, *, force: bool = False) -> None:
        self._folder = atomic_folder(Path(out), force=force)
        self._shards: list[ShardWriter] = []

    def __enter__(self) -> FolderWriter:
        self.path = self._folder.__enter__()
        return self

    def __exit__(self, *raised: Any) -> bool | None:
        if raised[0] is None:
            try:
                self._finish()
            except BaseException as error:  # the folder must be removed after any error
                if not self._folder.__exit__(type(error), error, error.__traceback__):
                    raise
        return self._folder.__exit__(*raised)

    def add(self, name: str, tensor: Tensor) -> None:
        """Writes a tensor into the current shard, after a new one was begun if that is full."""
        size = tensor.numel() * tensor.element_size()
        with self._naming_folder():
            full = bool(self._shards) and self._shards[-1].size + size > _MAX_SHARD_BYTES
            if full:
                self._shards[-1].finish()
            if full or not self._shards:
                self._shards.append(ShardWriter(self.path / f"shard-{len(self._shards) + 1}"))
            self._shards[-1].add(name, tensor)

    def write_json(self, name: str, tree: Any) -> None:
        """Writes a JSON file in the folder."""
        self.write_text(name, json.dumps(tree, indent=2, sort_keys=True) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Writes a text file in the folder."""
        (self.path / name).write_text(text, encoding="utf-8")

    def copy_generation_config(self, source: str | Path) -> None:
        """Copies generation_config.json of another folder, if there is one and none was copied before."""
        self._copy(Path(source), "generation_config.json")

    def copy_tokenizer(self, source: str | Path) -> None:
        """Copies the tokenizer files of another folder, byte for byte, chat templates included."""
        for pattern in TOKENIZER_FILES:
            for path in Path(source).glob(pattern):
                self._copy(Path(source), str(path.relative_to(source)))

    def _copy(self, source: Path, name: str) -> None:
        if (source / name).is_file() and not (self.path / name).exists():
            (self.path / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, self.path / name)

    def copy_licence(self, source: str | Path) -> None:
        """Copies the licence files of another folder."""
        for path in licence_files(source):
            shutil.copyfile(path, self.path / path.name)

    @contextmanager
    def _naming_folder(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(f"{self.path.parent}: cannot write the weights ({error})") from error

    def _finish(self) -> None:
        with self._naming_folder():
            if self._shards:
                self._shards[-1].finish()
        count, weight_map = len(self._shards), {}
        for number, shard in enumerate(self._shards, start=1):
            file = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            shard.out.rename(self.path / file)
            weight_map.update(dict.fromkeys(shard.names, file))
        if count > 1:
            total = sum(shard.size for shard in self._shards)
            self.write_json(
                "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
            )

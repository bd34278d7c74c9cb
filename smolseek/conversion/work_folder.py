"""The finished parts of a conversion, kept beside its output folder until that folder is complete."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from smolseek.checkpoint.atomic import LOCK, exclusive, sync
from smolseek.numerics.shares import ALONE, Shares

log = logging.getLogger(__name__)

_PARTIAL = ".partial"


class WorkFolder(AbstractContextManager["WorkFolder"]):
    """`.NAME.unfinished-DIGEST` beside the folder to write: tensors and facts of each finished part, whole or absent.

    The digest is that of `fingerprint`, everything that the parts depend on. When the block ends well the folder is
    removed. After any error it stays if a part is finished, and the next conversion with an equal fingerprint finds the
    parts again; conversions with another one leave it alone.

    Of several processes the leading one alone writes and reads parts, and tells the others; the fingerprint is its own.

    Raises:
        ValueError: another conversion is at work in the folder.
    """

    def __init__(self, out: Path, fingerprint: dict[str, Any], shares: Shares = ALONE) -> None:
        digest = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:12]
        self.shares = shares
        self.path = shares.by_leader(lambda: out.parent / f".{out.name}.unfinished-{digest}")

    def __enter__(self) -> WorkFolder:
        self.shares.by_leader(self._open)
        return self

    def _open(self) -> None:
        self._lock = exclusive(self.path)
        self._lock.__enter__()
        for other in self.path.parent.glob(f"{self.path.name.rpartition('-')[0]}*"):
            if other != self.path:
                log.warning("%s: holds work of other settings; remove it if you do not want it", other)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.shares.leads:
            return
        files = [path.name for path in self.path.iterdir() if path.is_file()]
        finished = any(name != LOCK and not name.endswith(_PARTIAL) for name in files)
        if kind is None or not finished:
            shutil.rmtree(self.path, ignore_errors=True)
        else:
            log.warning("%s: holds what is finished; the same command goes on from there", self.path)
        self._lock.__exit__(kind, error, trace)

    def check_seen(self) -> None:
        """Raises ValueError if a process does not see the folder: they read each other's files in it."""
        self.shares.each(self._check_seen, range(self.shares.size))

    def _check_seen(self, process: int) -> None:
        if not self.path.is_dir():
            raise ValueError(
                f"{self.path.parent}: process {process} does not see it; name a folder that all processes see"
            )

    def put(self, part: str, tensors: dict[str, Tensor], facts: Any) -> None:
        """Write a part.

        Raises:
            OSError: it cannot be written, because the disk is full, for example.
        """
        if not self.shares.leads:
            return
        partial = self.path / f"{part}{_PARTIAL}"
        whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        try:
            save_file(whole, partial, metadata={"facts": json.dumps(facts)})
            sync(partial)
            os.replace(partial, self.path / part)
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"{partial}: cannot be written ({error}); free some space, and the same command goes on from there"
            ) from error

    def get(self, part: str) -> tuple[dict[str, Tensor], Any] | None:
        """Returns a part's tensors and facts, or None if it is not finished; in every process the same."""
        return self.shares.by_leader(lambda: self._read(part))

    def _read(self, part: str) -> tuple[dict[str, Tensor], Any] | None:
        path = self.path / part
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["facts"])  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            log.warning("%s: cannot be read (%s), and is made again", path, error)
            return None

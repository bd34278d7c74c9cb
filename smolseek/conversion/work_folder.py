"""The finished parts of a conversion, kept beside its output folder until that folder is complete."""

from __future__ import annotations

import json
import logging
import os
import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

log = logging.getLogger(__name__)

_FINGERPRINT = "fingerprint.json"


class WorkFolder(AbstractContextManager["WorkFolder"]):
    """`.NAME.unfinished` beside the folder to write: tensors and facts of each finished part, complete or absent.

    When the block ends well, or by a user's mistake, the folder is removed. When the process is interrupted it stays,
    and the next conversion with an equal `fingerprint` finds the parts again.
    """

    def __init__(self, out: Path, fingerprint: dict[str, Any]) -> None:
        self.path = out.parent / f".{out.name}.unfinished"
        self._fingerprint = json.dumps(fingerprint, sort_keys=True)

    def __enter__(self) -> WorkFolder:
        mark = self.path / _FINGERPRINT
        if not mark.is_file() or mark.read_text(encoding="utf-8") != self._fingerprint:
            shutil.rmtree(self.path, ignore_errors=True)
            self.path.mkdir(parents=True)
            mark.write_text(self._fingerprint, encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or issubclass(kind, ValueError):
            shutil.rmtree(self.path, ignore_errors=True)
        else:
            log.warning("%s: holds what is finished; the same command goes on from there", self.path)

    def put(self, part: str, tensors: dict[str, Tensor], facts: Any) -> None:
        """Write a part."""
        partial = self.path / f"{part}.partial"
        whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        save_file(whole, partial, metadata={"facts": json.dumps(facts)})
        os.replace(partial, self.path / part)

    def get(self, part: str) -> tuple[dict[str, Tensor], Any] | None:
        """Returns a part's tensors and facts, or None if it is not finished."""
        path = self.path / part
        if not path.is_file():
            return None
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["facts"])  # noqa: SIM118

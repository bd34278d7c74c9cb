"""Where text comes from: local files, hub data sets and the running Python; each resumable at any document."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable
from pathlib import Path

from smolseek.config import PROSE, SELF, SEPARATOR, DataSettings
from smolseek.data.documents import Columns
from smolseek.data.sources.base import ChainedSources, Source
from smolseek.data.sources.files import READERS, FileSource
from smolseek.data.sources.hub import HubSource
from smolseek.data.sources.python import PythonSource

_PROSE = Path(__file__).parents[2] / "assets" / "prose"
_REMEDIES = {".json": "write one JSON object a line, as .jsonl"} | dict.fromkeys(
    (".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz", ".7z"), "unpack it"
)
"""What to do with files of other types."""


def open_source(spec: str, *, columns: Columns = Columns(), separator: str = SEPARATOR) -> Source:  # noqa: B008
    """Returns the source that `spec` names: builtin:python, builtin:prose, hub:ID[@REVISION][:CONFIG], or local files.

    builtin:prose is text of many kinds that comes with smolseek. Local files are a file or a glob (.txt, .jsonl,
    .parquet), or a folder: all such files in it and in its subfolders.

    Raises:
        ValueError: no such file, no files in the folder, a file's type is not one of the three, or the name is that of
            the text which a model writes itself.
    """
    if spec == SELF:
        raise ValueError(
            f"data source {SELF}: is text that the model writes, for calibration alone; a folder called so is ./{SELF}"
        )
    if spec == "builtin:python":
        return PythonSource()
    if spec == PROSE:
        return FileSource(_files(str(_PROSE)), columns, SEPARATOR)
    if spec.startswith("builtin:"):
        raise ValueError(f"data source {spec}: unknown; the built-in texts are builtin:python and {PROSE}")
    if spec.startswith("hub:"):
        return HubSource(spec, columns)
    return FileSource(_files(spec), columns, separator)


def _files(spec: str) -> list[Path]:
    """Returns the files that a file's or folder's name or a glob stands for, sorted."""
    named = [spec] if os.path.exists(spec) else sorted(glob.glob(spec, recursive=True)) or [spec]
    paths: dict[Path, None] = {}  # a glob can give a folder and its files
    for name in named:
        paths |= dict.fromkeys(_files_below(Path(name)) if os.path.isdir(name) else [Path(name)])
    if not paths:
        raise ValueError(f"data source {spec}: no {', '.join(READERS)} file in this folder; name one that has some")
    for path in paths:
        if not os.path.isfile(path):
            raise ValueError(
                f"data source {spec or repr(spec)}: no such file; a hub data set is written hub:ID[@REVISION][:CONFIG]"
            )
        if (suffix := path.suffix.lower()) not in READERS:
            remedy = _REMEDIES.get(suffix, "convert it to one of them")
            raise ValueError(
                f"data source {path}: file type {suffix or '(none)'} is not {', '.join(READERS)}; {remedy}"
            )
    return [*paths]


def _files_below(folder: Path) -> list[Path]:
    """Returns the readable files in a folder and its subfolders, without hidden ones."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in READERS
        and os.path.isfile(path)
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]


def local_sizes(specs: Iterable[str]) -> dict[str, int]:
    """Returns the bytes of each local file that the specs stand for, by its path; what is built in or a hub's has none.

    Raises:
        ValueError: as `open_source` does.
    """
    local = [spec for spec in specs if not spec.startswith(("builtin:", "hub:"))]
    return {str(path): path.stat().st_size for spec in local for path in _files(spec)}


def open_sources(specs: Iterable[str], settings: DataSettings = DataSettings()) -> ChainedSources:  # noqa: B008
    """Returns several sources as one, read with the columns and the separator of `settings`.

    Raises:
        ValueError: as `open_source` does.
    """
    columns = Columns(settings.text_column, settings.messages_column)
    return ChainedSources(open_source(spec, columns=columns, separator=settings.separator) for spec in specs)

"""Where text comes from: local files, hub data sets and the running Python; each resumable at any document."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from pathlib import Path

from smolseek.config import SEPARATOR, DataSettings
from smolseek.data.documents import Columns
from smolseek.data.sources.base import ChainedSources, Source
from smolseek.data.sources.files import READERS, FileSource
from smolseek.data.sources.hub import HubSource
from smolseek.data.sources.python import PythonSource


def open_source(spec: str, *, columns: Columns = Columns(), separator: str = SEPARATOR) -> Source:  # noqa: B008
    """Returns the source that `spec` names: builtin:python, hub:ID[:CONFIG], a file or a glob (.txt, .jsonl, .parquet).

    Raises:
        ValueError: no such file, or its type is not one of the three.
    """
    if spec == "builtin:python":
        return PythonSource()
    if spec.startswith("builtin:"):
        raise ValueError(f"data source {spec}: unknown; the built-in text is builtin:python")
    if spec.startswith("hub:"):
        return HubSource(spec, columns)
    paths = [Path(p) for p in sorted(glob.glob(spec, recursive=True))] or [Path(spec)]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"data source {spec}: no such file; a hub data set is written hub:ID[:CONFIG]")
        if path.suffix not in READERS:
            raise ValueError(f"data source {path}: file type {path.suffix or '(none)'} is not {', '.join(READERS)}")
    return FileSource(paths, columns, separator)


def open_sources(specs: Iterable[str], settings: DataSettings = DataSettings()) -> ChainedSources:  # noqa: B008
    """Returns several sources as one, read with the columns and the separator of `settings`.

    Raises:
        ValueError: as `open_source` does.
    """
    columns = Columns(settings.text_column, settings.messages_column)
    return ChainedSources(open_source(spec, columns=columns, separator=settings.separator) for spec in specs)

"""Documents of local text, JSON Lines and Parquet files."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from smolseek.data.documents import EMPTY_DOCUMENT, Columns, Document, document_from_row
from smolseek.data.sources.base import Source

log = logging.getLogger(__name__)


class FileSource(Source):
    """Documents of local files, one file after the other; a position is (number of the file, records read of it)."""

    def __init__(self, paths: list[Path], columns: Columns, separator: str) -> None:
        self.paths, self.columns, self.separator = paths, columns, separator

    def records(self, position: Any) -> Iterator[tuple[Any, Document | None]]:
        first, skip = position or (0, 0)
        for index in range(first, len(self.paths)):
            start = skip if index == first else 0
            yield from (((index, record), document) for record, document in self._file(self.paths[index], start))

    def _file(self, path: Path, start: int) -> Iterator[tuple[int, Document | None]]:
        """Yields the records of a file after the first `start`, numbered from 1; warns of the first malformed one."""
        warned = False
        records = READERS[path.suffix](path, self)
        for number, document in enumerate(itertools.islice(records, start, None), start=start + 1):
            if document is None and not warned:
                log.warning(
                    "%s line %d: no JSON object with text in %r or messages in %r; such lines of this file are skipped "
                    "and counted",
                    *(path, number, *self.columns),
                )
                warned = True
            if document is None or document.text.strip():
                yield number, document


def _read_txt(path: Path, source: FileSource) -> Iterator[Document | None]:
    """Yields the texts between separators; reads the file in blocks."""
    rest = ""
    with path.open(encoding="utf-8", errors="replace") as file:
        while block := file.read(1 << 20):
            *whole, rest = (rest + block).split(source.separator)
            for text in whole:
                yield Document(text.strip("\n"), text.strip("\n"))
    yield Document(rest.strip("\n"), rest.strip("\n"))


def _read_jsonl(path: Path, source: FileSource) -> Iterator[Document | None]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                yield document_from_row(json.loads(line), source.columns) if line.strip() else EMPTY_DOCUMENT
            except (
                ValueError,
                RecursionError,
            ):  # not JSON, or thousands of digits or brackets
                yield None


def _read_parquet(path: Path, source: FileSource) -> Iterator[Document | None]:
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(path)
    names = [name for name in source.columns if name in file.schema_arrow.names]
    if not names:
        raise ValueError(f"data source {path}: {source.columns.missing_message(file.schema_arrow.names)}")
    for batch in file.iter_batches(columns=names):
        for row in batch.to_pylist():
            yield document_from_row({source.columns.text: None} | row, source.columns)


READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}

"""Documents of local text, JSON Lines and Parquet files."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from smolseek.data.documents import EMPTY_DOCUMENT, Columns, Document, cut_texts, document_from_row, text_document
from smolseek.data.sources.base import Source
from smolseek.formats.foreign import check_no_pointer
from smolseek.formats.text import open_text

log = logging.getLogger(__name__)

_BLOCK_CHARACTERS = 1 << 20
_ROWS_AT_ONCE = 1024  # the library's own 65,536 rows of long texts fill the memory


class FileSource(Source):
    """Documents of local files, one file after the other; a position is (number of the file, records read of it)."""

    def __init__(self, paths: list[Path], columns: Columns, separator: str) -> None:
        if not separator:
            raise ValueError("data.separator '': must have a character; leave it out for <|endoftext|>")
        self.paths, self.columns, self.separator = paths, columns, separator

    def whole_records(self, position: Any) -> Iterator[tuple[Any, Document | None]]:
        first, skip = position or (0, 0)
        for index in range(first, len(self.paths)):
            start = skip if index == first else 0
            yield from (((index, record), document) for record, document in self._file(self.paths[index], start))

    def size(self) -> int:
        """Returns the bytes of the files; of a Parquet file those of its text column, unpacked."""
        return sum(_size(path, self.columns) for path in self.paths)

    def _file(self, path: Path, start: int) -> Iterator[tuple[int, Document | None]]:
        """Yields the records of a file after the first `start`, numbered from 1; warns of the first malformed one."""
        warned = False
        records = READERS[path.suffix.lower()](path, self)
        for number, document in enumerate(itertools.islice(records, start, None), start=start + 1):
            if isinstance(document, str) and not warned:
                trouble = f"{path} line {number}: {document}"
                log.warning("%s; such lines of this file are skipped and counted", trouble)
                self.trouble, warned = self.trouble or trouble, True
            if document != EMPTY_DOCUMENT:
                yield number, None if isinstance(document, str) else document


def _read_txt(path: Path, source: FileSource) -> Iterator[Document | str]:
    """Yields the texts between separators, long ones in parts, which are the records; reads the file in blocks."""
    begun = False
    with open_text(path) as file:
        blocks = iter(lambda: file.read(_BLOCK_CHARACTERS), "")
        for text, ends in cut_texts(_without_outer_newlines(_split(blocks, source.separator))):
            whole = ends and not begun
            yield text_document(text) if whole else Document(text, text, ends=ends)
            begun = not ends


def _split(blocks: Iterable[str], separator: str) -> Iterator[tuple[str, bool]]:
    """Yields the texts between separators in pieces, each with whether its text ends there."""
    rest, overlap = "", len(separator) - 1
    for block in blocks:
        *whole, last = (rest + block).split(separator)
        yield from ((text, True) for text in whole)
        searched = max(0, len(last) - overlap)  # a separator can begin behind it
        yield last[:searched], False
        rest = last[searched:]
    yield rest, True


def _without_outer_newlines(pieces: Iterable[tuple[str, bool]]) -> Iterator[tuple[str, bool]]:
    """Yields the pieces of texts without the newlines at the texts' beginnings and ends."""
    begun, newlines = False, 0  # newlines that are dropped if the text ends behind them
    for piece, ends in pieces:
        piece = piece if begun else piece.lstrip("\n")
        inner = piece.rstrip("\n")
        if inner:
            yield "\n" * newlines + inner, False
            begun, newlines = True, 0
        newlines += len(piece) - len(inner)
        if ends:
            yield "", True
            begun, newlines = False, 0


def _read_jsonl(path: Path, source: FileSource) -> Iterator[Document | str]:
    """Yields the document of each line, or what is wrong with the line."""
    with open_text(path) as file:
        for line in file:
            yield _read_line(line, source.columns) if line.strip() else EMPTY_DOCUMENT


def _read_line(line: str, columns: Columns) -> Document | str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # not JSON, or thousands of digits or brackets
        row = None
    return document_from_row(row, columns) or columns.trouble(row)


def _read_parquet(path: Path, source: FileSource) -> Iterator[Document | str]:
    with _one_parquet_line(path):
        file = _open_parquet(path)
        there = file.schema_arrow.names
    names = _columns_there(path, source.columns, there)
    with file, _one_parquet_line(path):
        for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=names):
            for row in batch.to_pylist():
                row = {source.columns.text: None} | row
                yield document_from_row(row, source.columns) or source.columns.trouble(row)


def _columns_there(path: Path, columns: Columns, there: list[str]) -> list[str]:
    """Returns those of the two columns that a Parquet file has; ValueError if it has neither."""
    names = [name for name in columns if name in there]
    if not names:
        raise ValueError(f"data source {path}: {columns.missing_message(there)}")
    return names


def _open_parquet(path: Path) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(path)


@contextmanager
def _one_parquet_line(path: Path) -> Iterator[None]:
    """Turns the errors of reading a Parquet file into one line that names it."""
    import pyarrow

    check_no_pointer(path)
    try:
        yield
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"data source {path}: cannot be read as Parquet ({reason}); fetch or write the file again"
        ) from error


def _size(path: Path, columns: Columns) -> int:
    if path.suffix.lower() == ".parquet":
        return _parquet_size(path, columns)
    try:
        return path.stat().st_size
    except OSError as error:
        raise ValueError(f"data source {path}: cannot be read ({error.strerror}); check that it is there") from error


def _parquet_size(path: Path, columns: Columns) -> int:
    """Returns the unpacked bytes of the larger of the two columns: a row that has both is read from one of them."""
    sizes = dict.fromkeys(columns, 0)
    with _one_parquet_line(path), _open_parquet(path) as file:
        there = file.schema_arrow.names
        for group in map(file.metadata.row_group, range(file.metadata.num_row_groups)):
            for column in map(group.column, range(group.num_columns)):
                name = column.path_in_schema.partition(".")[0]
                if name in sizes:
                    sizes[name] += column.total_uncompressed_size
    return max(sizes[name] for name in _columns_there(path, columns, there))


READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}

"""Where text comes from: documents of files, hub data sets and the running interpreter, resumable at any document."""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import logging
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

log = logging.getLogger(__name__)

# Packages and modules of the standard library that every CPython 3.11 to 3.13 carries (a few only some of them);
# no tests, no encodings, no modules that are mostly tables.
PYTHON_MODULES = """
_collections_abc _markupbase _pydecimal _pyio _strptime _threading_local _weakrefset abc argparse ast asyncio base64
bdb bisect bz2 cProfile calendar cmd code codecs codeop collections colorsys compileall concurrent configparser
contextlib copy copyreg csv ctypes curses dataclasses datetime dbm difflib dis doctest email enum filecmp fileinput
fnmatch fractions ftplib functools genericpath getopt getpass gettext glob graphlib gzip hashlib heapq hmac html http
imaplib importlib inspect io ipaddress json linecache locale logging lzma mailbox mimetypes modulefinder
multiprocessing netrc ntpath nturl2path numbers operator optparse os pathlib pdb pickle pickletools pkgutil platform
plistlib poplib posixpath pprint profile pstats pty py_compile pyclbr pydoc queue quopri random re reprlib rlcompleter
runpy sched secrets selectors shelve shlex shutil signal site smtplib socket socketserver sqlite3 ssl stat statistics
string struct subprocess symtable sysconfig tabnanny tarfile tempfile textwrap threading timeit tkinter tokenize
tomllib trace traceback tracemalloc tty turtle types typing unittest urllib uuid warnings wave weakref webbrowser
wsgiref xml xmlrpc zipapp zipfile zipimport zoneinfo
""".split()
PYTHON_TABLES = {"html.entities", "email.architecture"}


class Document(NamedTuple):
    """One text; the name decides on which side of the held-out split it falls."""

    name: str
    text: str


class Source(Protocol):
    """Documents in a fixed order that can be continued from a saved position."""

    def documents(self, position: Any) -> Iterator[tuple[Any, Document]]:
        """Documents from `position` on (None: the first), each with the position that follows it (JSON-able)."""
        ...


def is_held_out(document: Document, share: float) -> bool:
    """Whether a document belongs to the held-out split, decided by a hash of its name alone."""
    digest = hashlib.blake2b(document.name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def open_source(spec: str, *, text_column: str = "text", separator: str = "<|endoftext|>") -> Source:
    """The source that `spec` names: builtin:python, hub:ID[:CONFIG], a file or a glob (.txt, .jsonl, .parquet).

    Raises:
        ValueError: nothing is there, or the file type is not one of the three.
    """
    if spec == "builtin:python":
        return PythonSource()
    if spec.startswith("builtin:"):
        raise ValueError(f"data source {spec}: unknown; the built-in text is builtin:python")
    if spec.startswith("hub:"):
        return HubSource(spec, text_column)
    paths = [Path(p) for p in sorted(glob.glob(spec, recursive=True))] or [Path(spec)]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"data source {spec}: no such file; a hub data set is written hub:ID[:CONFIG]")
        if path.suffix not in READERS:
            raise ValueError(f"data source {path}: file type {path.suffix or '(none)'} is not {', '.join(READERS)}")
    return FileSource(paths, text_column, separator)


class PythonSource:
    """The language reference and the sources of standard-library modules, read from the running interpreter."""

    def documents(self, position: Any) -> Iterator[tuple[Any, Document]]:
        names = sorted([*self._topics(), *self._modules()])
        for index in range(position or 0, len(names)):
            yield index + 1, Document(names[index], self._read(names[index]))

    @staticmethod
    def _topics() -> list[str]:
        from pydoc_data.topics import topics

        return [f"topic {name}" for name in topics]

    @staticmethod
    def _modules() -> list[str]:
        library, names = Path(sysconfig.get_path("stdlib")), []
        for entry in PYTHON_MODULES:
            package = library / entry
            paths = package.rglob("*.py") if package.is_dir() else [library / f"{entry}.py"]
            for path in paths:
                name = ".".join(path.relative_to(library).with_suffix("").parts)
                if (
                    path.is_file()
                    and not {"test", "tests", "idle_test"} & set(path.parts)
                    and name not in PYTHON_TABLES
                ):
                    names.append(f"module {name}")
        return names

    @staticmethod
    def _read(name: str) -> str:
        kind, _, key = name.partition(" ")
        if kind == "topic":
            from pydoc_data.topics import topics

            return topics[key]
        path = Path(sysconfig.get_path("stdlib"), *key.split("."))
        return path.with_suffix(".py").read_text(encoding="utf-8", errors="replace")


class FileSource:
    """Documents of local files, one file after the other; position is (file, record)."""

    def __init__(self, paths: list[Path], text_column: str, separator: str) -> None:
        self.paths, self.text_column, self.separator = paths, text_column, separator

    def documents(self, position: Any) -> Iterator[tuple[Any, Document]]:
        first, skip = position or (0, 0)
        for index in range(first, len(self.paths)):
            records = READERS[self.paths[index].suffix](self.paths[index], self)
            start = skip if index == first else 0
            for record, text in enumerate(itertools.islice(records, start, None), start=start + 1):
                if text.strip():
                    yield (index, record), Document(text, text)


def _read_txt(path: Path, source: FileSource) -> Iterator[str]:
    """Texts between separators, read a block at a time."""
    rest = ""
    with path.open(encoding="utf-8", errors="replace") as file:
        while block := file.read(1 << 20):
            *whole, rest = (rest + block).split(source.separator)
            for text in whole:
                yield text.strip("\n")
    yield rest.strip("\n")


def _read_jsonl(path: Path, source: FileSource) -> Iterator[str]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                yield ""
                continue
            try:
                yield str(json.loads(line)[source.text_column])
            except (json.JSONDecodeError, KeyError, TypeError):
                log.warning("%s line %d: no JSON object with a field %r; skipped", path, number, source.text_column)
                yield ""


def _read_parquet(path: Path, source: FileSource) -> Iterator[str]:
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(path)
    if source.text_column not in file.schema_arrow.names:
        raise ValueError(
            f"data source {path}: no column {source.text_column!r}; it has {', '.join(file.schema_arrow.names)}: "
            "set data.text_column"
        )
    for batch in file.iter_batches(columns=[source.text_column]):
        for value in batch.column(0).to_pylist():
            yield value or ""


READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


class HubSource:
    """A hub data set through `datasets` streaming; position is the library's own state."""

    def __init__(self, spec: str, text_column: str) -> None:
        _, self.id, *config = spec.split(":")
        self.config, self.text_column = (config[0] if config else None), text_column

    def documents(self, position: Any) -> Iterator[tuple[Any, Document]]:
        rows = self._open()
        if position is not None:
            rows.load_state_dict(position)
        for row in rows:
            if self.text_column not in row:
                raise ValueError(
                    f"data source hub:{self.id}: no column {self.text_column!r}; it has {', '.join(row)}: "
                    "set data.text_column"
                )
            if row[self.text_column]:
                # The library's state names the next row only once it has been asked for, so it is read here.
                yield rows.state_dict(), Document(row[self.text_column], row[self.text_column])

    def _open(self) -> Any:
        import datasets

        try:
            return datasets.load_dataset(self.id, self.config, split="train", streaming=True)
        except (OSError, RuntimeError, ValueError, datasets.exceptions.DatasetsError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"data source hub:{self.id}: cannot be opened ({type(error).__name__}: {reason}); check the id and the "
                "connection, or name local files with --data.train FILE"
            ) from error


class Mixture:
    """Sources one after the other as one source; position is (source, its position)."""

    def __init__(self, sources: Iterable[Source]) -> None:
        self.sources = list(sources)

    def documents(self, position: Any) -> Iterator[tuple[Any, Document]]:
        first, inner = position or (0, None)
        for index in range(first, len(self.sources)):
            for following, document in self.sources[index].documents(inner if index == first else None):
                yield (index, following), document


def open_sources(specs: Iterable[str], **options: str) -> Mixture:
    """Several sources as one, in order."""
    return Mixture(open_source(spec, **options) for spec in specs)

"""Where text comes from: documents of files, hub data sets and the running interpreter, resumable at any document."""

from __future__ import annotations

import copy
import glob
import hashlib
import http.client
import itertools
import json
import logging
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

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

RETRY_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
"""Waits before a dropped stream is opened again; the list starts anew with every row that arrives."""


class Document(NamedTuple):
    """One text, or one conversation; the name decides on which side of the held-out split it falls."""

    name: str
    text: str
    messages: tuple[dict[str, Any], ...] = ()
    """Of a conversation: its messages; `text` is then what they say, line by line."""


EMPTY = Document("", "")


class Columns(NamedTuple):
    """Where rows hold their text, and where the messages of a conversation, which go first."""

    text: str = "text"
    messages: str = "messages"

    def missing(self, there: Iterable[str]) -> str:
        """What to tell about rows that have neither column."""
        return f"no column {self.text!r} or {self.messages!r}; it has {', '.join(there)}: set data.text_column"


class SourceLost(ConnectionError):
    """A streamed source that stayed away however often it was opened again."""


class Unreachable(ValueError):
    """A hub data set that cannot be opened."""


class Source:
    """Records in a fixed order that can be continued from a saved position."""

    def records(self, position: Any) -> Iterator[tuple[Any, Document | None]]:
        """Records from `position` on (None: the first), each with the position that follows it (JSON-able).

        A record that is no document (malformed) is None, so that it can be counted.
        """
        raise NotImplementedError

    def documents(self, position: Any) -> Iterator[tuple[Any, Document]]:
        """As `records`, malformed ones left out."""
        for following, document in self.records(position):
            if document is not None:
                yield following, document


def row_document(row: Any, columns: Columns) -> Document | None:
    """The document of a row, an empty one where its field is null; None where the row is malformed."""
    if not isinstance(row, dict):
        return None
    messages = row.get(columns.messages)
    if messages is not None:
        return _conversation(messages)
    text = row.get(columns.text, 0)
    if text is None:
        return EMPTY
    return Document(text, text) if _is_text(text) else None


def _conversation(messages: Any) -> Document | None:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return None
    if not all(_is_text(message.get(key)) for message in messages for key in ("role", "content")):
        return None
    text = "\n".join(message["content"] for message in messages)
    # Columnar files give every message the keys of all of them: those without a value were not there.
    kept = ({key: value for key, value in message.items() if value is not None} for message in messages)
    return Document(text, text, tuple(kept))


def _is_text(value: Any) -> bool:
    """Whether it is a string that can be written as UTF-8 (JSON can spell half a surrogate pair)."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def is_held_out(document: Document, share: float) -> bool:
    """Whether a document belongs to the held-out split, decided by a hash of its name alone."""
    digest = hashlib.blake2b(document.name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def open_source(spec: str, *, columns: Columns = Columns(), separator: str = "<|endoftext|>") -> Source:  # noqa: B008
    """The source that `spec` names: builtin:python, hub:ID[:CONFIG], a file or a glob (.txt, .jsonl, .parquet).

    Raises:
        ValueError: nothing is there, or the file type is not one of the three.
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


class PythonSource(Source):
    """The language reference and the sources of standard-library modules, read from the running interpreter."""

    def records(self, position: Any) -> Iterator[tuple[Any, Document | None]]:
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


class FileSource(Source):
    """Documents of local files, one file after the other; position is (file, record)."""

    def __init__(self, paths: list[Path], columns: Columns, separator: str) -> None:
        self.paths, self.columns, self.separator = paths, columns, separator

    def records(self, position: Any) -> Iterator[tuple[Any, Document | None]]:
        first, skip = position or (0, 0)
        for index in range(first, len(self.paths)):
            start = skip if index == first else 0
            yield from (((index, record), document) for record, document in self._file(self.paths[index], start))

    def _file(self, path: Path, start: int) -> Iterator[tuple[int, Document | None]]:
        """Records of one file after the first `start`, numbered from 1; the first malformed one is warned of."""
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
    """Texts between separators, read a block at a time."""
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
                yield row_document(json.loads(line), source.columns) if line.strip() else EMPTY
            except (ValueError, RecursionError):  # not JSON, a number of thousands of digits, thousands of brackets
                yield None


def _read_parquet(path: Path, source: FileSource) -> Iterator[Document | None]:
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(path)
    names = [name for name in source.columns if name in file.schema_arrow.names]
    if not names:
        raise ValueError(f"data source {path}: {source.columns.missing(file.schema_arrow.names)}")
    for batch in file.iter_batches(columns=names):
        for row in batch.to_pylist():
            yield row_document({source.columns.text: None} | row, source.columns)


READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


class HubSource(Source):
    """A hub data set through `datasets` streaming; position is the library's own state.

    A connection that drops is opened again at the row after the last one that arrived, with growing waits.
    """

    def __init__(self, spec: str, columns: Columns) -> None:
        _, self.id, *config = spec.split(":")
        self.config, self.columns = (config[0] if config else None), columns

    def records(self, position: Any) -> Iterator[tuple[Any, Document | None]]:
        for following, row in self._rows(position):
            if not {*self.columns} & row.keys():
                raise ValueError(f"data source hub:{self.id}: {self.columns.missing(row)}")
            document = row_document({self.columns.text: None} | row, self.columns)
            if document is None or document.text.strip():
                yield following, document

    def _rows(self, position: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Rows after `position`, each with the position that follows it.

        Raises:
            ValueError: it cannot be opened the first time (`Unreachable`), or the library cannot read a shard.
            SourceLost: after the last wait of `RETRY_SECONDS` no row came either.
        """
        failures, opened = 0, False
        while True:
            try:
                rows = self._open()
                opened = True
                if position is not None:
                    rows.load_state_dict(copy.deepcopy(position))
                for row in rows:
                    # The library's state names the next row only once it has been asked for, so it is read here.
                    position, failures = rows.state_dict(), 0
                    yield position, row
                return
            except Exception as error:
                if not opened or not isinstance(error, (ValueError, *_connection_errors())):
                    raise
                if isinstance(error, ValueError) and not isinstance(error, Unreachable):
                    raise ValueError(
                        f"data source hub:{self.id}: a shard cannot be read ({_reason(error)}); download its files and "
                        "name them with data.train: of local files malformed lines are skipped"
                    ) from error
                self._wait(failures, error)
                failures += 1

    def _wait(self, failures: int, error: Exception) -> None:
        reason = _reason(error)
        if failures == len(RETRY_SECONDS):
            raise SourceLost(
                f"data source hub:{self.id}: lost, and {failures} attempts to read on failed ({reason}); check the "
                "connection and go on with --resume"
            ) from error
        log.warning("hub:%s: %s; read on in %g s", self.id, reason, RETRY_SECONDS[failures])
        time.sleep(RETRY_SECONDS[failures])

    def _open(self) -> Any:
        import datasets

        try:
            return datasets.load_dataset(self.id, self.config, split="train", streaming=True)
        except (OSError, RuntimeError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise Unreachable(
                f"data source hub:{self.id}: cannot be opened ({_reason(error)}); check the id and the "
                "connection, or name local files with --data.train FILE"
            ) from error


def _reason(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _connection_errors() -> tuple[type[Exception], ...]:
    """What the libraries under `datasets` raise when a connection breaks or a compressed file ends too early."""
    clients = {"httpx": "HTTPError", "httpx2": "HTTPError", "aiohttp": "ClientError"}
    # A client that was never imported raised nothing.
    theirs = (getattr(sys.modules[module], name) for module, name in clients.items() if module in sys.modules)
    return OSError, EOFError, http.client.HTTPException, *theirs


class Mixture(Source):
    """Sources one after the other as one source; position is (source, its position)."""

    def __init__(self, sources: Iterable[Source]) -> None:
        self.sources = list(sources)

    def records(self, position: Any) -> Iterator[tuple[Any, Document | None]]:
        first, inner = position or (0, None)
        for index in range(first, len(self.sources)):
            for following, document in self.sources[index].records(inner if index == first else None):
                yield (index, following), document


def open_sources(specs: Iterable[str], **options: Any) -> Mixture:
    """Several sources as one, in order."""
    return Mixture(open_source(spec, **options) for spec in specs)

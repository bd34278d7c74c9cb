"""Text that every Python installation has: the language reference and the sources of the standard library."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from smolseek.data.documents import Document
from smolseek.data.sources.base import Source

# Packages and modules of the standard library of CPython 3.11 to 3.13 (a few are not in all three versions);
# without tests, encodings and modules that are mostly tables.
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


class PythonSource(Source):
    """The language reference and the sources of standard-library modules, read from the running interpreter."""

    def whole_records(self, position: Any) -> Iterator[tuple[Any, Document | None]]:
        names = self._names()
        for index in range(position or 0, len(names)):
            if (text := self._read(names[index])).strip():
                yield index + 1, Document(names[index], text)

    def size(self) -> int:
        """Returns the bytes of all topics and modules."""
        return sum(len(self._read(name).encode()) for name in self._names())

    def _names(self) -> list[str]:
        return sorted([*self._topics(), *self._modules()])

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

"""Text files that users name. UTF-8 is read; every other file is refused in one line with the remedy."""

from __future__ import annotations

import codecs
import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from smolseek.formats.foreign import check_no_pointer

log = logging.getLogger(__name__)

_HEAD_BYTES = 1 << 20
_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),  # before UTF-16, whose mark is its beginning
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


def read_text(path: Path) -> str:
    r"""Returns a file's text, without a byte order mark; all line ends are \n.

    Raises:
        ValueError: the file cannot be read, is not UTF-8 text, or is a Git LFS pointer.
    """
    check_no_pointer(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(_cannot_be_read(path, error)) from error
    return _decode(path, content, whole=True).replace("\r\n", "\n").replace("\r", "\n")


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """Opens a large file for reading, behind a byte order mark; the first MiB is checked before anything is read.

    Broken bytes further on are read as U+FFFD, with one warning.

    Raises:
        ValueError: the file cannot be read, its first MiB is not UTF-8 text, or it is a Git LFS pointer.
    """
    check_no_pointer(path)
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
            _decode(path, head, whole=len(head) < _HEAD_BYTES)
            file.seek(0)
            with io.TextIOWrapper(file, encoding="utf-8-sig", errors=_replacing(path)) as text:
                yield text
    except OSError as error:
        raise ValueError(_cannot_be_read(path, error)) from error


def is_text(value: Any) -> bool:
    """Returns whether the value is a string that UTF-8 can write (JSON and YAML can spell half a surrogate pair)."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _decode(path: Path, content: bytes, *, whole: bool) -> str:
    """Returns the text of a file, or of its beginning, which may end inside a character."""
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), None) or _utf16_without_mark(content)
    if encoding:
        raise ValueError(f"{path}: seems to be {encoding}, not UTF-8; {_save_as_utf8(path, encoding)}")
    if (nul := content.find(0)) >= 0:
        raise ValueError(f"{path}: no text (byte {nul:,} is NUL); name a file of UTF-8 text")
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(content, final=whole).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        remedy = _save_as_utf8(path, "LATIN1")
        raise ValueError(f"{path}: not UTF-8 at byte {error.start:,}; if it is Latin-1, {remedy}") from error


def _utf16_without_mark(content: bytes) -> str | None:
    """Returns the byte order of UTF-16 that has no mark: in most scripts' texts every second byte is often NUL."""
    head = content[:4096]
    even, odd = head[::2].count(0), head[1::2].count(0)
    if max(even, odd) <= len(head) / 8 or min(even, odd) > max(even, odd) / 10:
        return None
    return "UTF-16LE" if odd > even else "UTF-16BE"


def _save_as_utf8(path: Path, encoding: str) -> str:
    return f"save it as UTF-8: iconv -f {encoding} -t UTF-8 {path} > NEW"


def _cannot_be_read(path: Path, error: OSError) -> str:
    return f"{path}: cannot be read ({error.strerror or error}); check that it is there and that you may read it"


def _replacing(path: Path) -> str:
    """Returns the name of a codecs error handler that puts U+FFFD for broken bytes and warns of the first.

    The handler has the path's name, because codecs tells a handler no file and cannot forget it again.
    """
    warned = False

    def replace(error: UnicodeError) -> tuple[str | bytes, int]:
        nonlocal warned
        if not warned:
            log.warning("%s: not all of it is UTF-8; broken bytes are read as U+FFFD", path)
            warned = True
        return codecs.replace_errors(error)

    name = f"smolseek {str(path)!a}"
    codecs.register_error(name, replace)
    return name

"""Errors of libraries as one line of ours. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_OUT_OF_MEMORY = "OutOfMemoryError"  # torch's
_PANIC = "PanicException"  # that of tokenizers, in Rust


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turns whatever a library raises into a ValueError of one line, `what` and the reason in brackets.

    There is no list of what it raises: a broken file meets any of its code. Too little memory is no fault of the file.
    """
    try:
        yield
    except BaseException as error:
        kind = type(error).__name__
        if isinstance(error, MemoryError) or kind == _OUT_OF_MEMORY:
            raise
        if not isinstance(error, Exception) and kind != _PANIC:
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # The line behind "Validation error for field ..." has the reason.
        said = " ".join(lines[:2] if lines and lines[0].endswith(":") else lines[:1])
        raise ValueError(f"{what} ({'' if kind == 'ValueError' else f'{kind}: '}{said[:200]})") from error

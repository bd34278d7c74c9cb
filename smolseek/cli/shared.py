"""Helpers of several verbs: device and dtype by name, quiet libraries, progress bars, tables and signals."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

Device = Literal["cpu", "cuda", "mps"]
Dtype = Literal["float32", "bfloat16"]


class StoppedBySignal(Exception):
    """A signal ended a run."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = number


@contextlib.contextmanager
def deferred_signals(defer: Callable[[], bool]) -> Iterator[list[int]]:
    """Handles SIGINT and SIGTERM inside the block; yields the list of the signals received.

    While `defer` returns true, the first signal is only added to the list. Any other signal raises `StoppedBySignal`.
    """
    received: list[int] = []

    def note(number: int, _frame: Any) -> None:
        if received or not defer():
            raise StoppedBySignal("stopped; go on with --resume", number)
        received.append(number)

    former = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """Yields a callback (stage, done, count); it draws a bar for each stage if standard error is a terminal."""
    from tqdm import tqdm

    bars: dict[str, tqdm[Any]] = {}

    def on_progress(stage: str, done: int, count: int) -> None:
        if stage not in bars:
            bars[stage] = tqdm(total=count, desc=stage, disable=not sys.stderr.isatty())
        bars[stage].update(done - bars[stage].n)

    try:
        yield on_progress
    finally:
        for bar in bars.values():
            bar.close()


def align_table(rows: Sequence[Sequence[str]]) -> str:
    """Returns a table as text, with the first column left-aligned and the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))] for row in rows)
    return "\n".join("  ".join(line) for line in lines)


def torch_dtype(name: str) -> Any:
    """Returns the torch dtype of that name."""
    import torch

    return getattr(torch, name)


def quiet_libraries() -> None:
    """Shows only warnings of ours; turns off progress bars and advice of the libraries."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.simplefilter("ignore", FutureWarning)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

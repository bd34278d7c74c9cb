"""Helpers of several verbs: device and dtype by name, quiet libraries, progress bars, tables and signals."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

Device = Literal["cpu", "cuda", "mps"]
Dtype = Literal["float32", "bfloat16"]
OnProgress = Callable[[str, int, int], None]
"""Told (stage, done, count)."""

_SECONDS_BETWEEN_LINES = 2.0
_MOST_SINGLE_LINES = 100  # a stage of more parts than that has a line for each tenth of them


class StoppedBySignal(Exception):
    """A signal ended a run."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = number


def leads() -> bool:
    """Returns whether this process prints: one, of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def said_once() -> Iterator[None]:
    """Lets one process tell of an error that all of torchrun's processes have; the others end with its status, 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        if leads():
            raise
        raise SystemExit(2) from error


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
def progress_bars() -> Iterator[OnProgress]:
    """Yields a callback that shows on standard error how far each stage is, and its time left.

    A terminal gets one bar for each stage; a file or pipe gets lines, as `ProgressLines` says.
    """
    if not sys.stderr.isatty():
        yield ProgressLines()
        return
    from tqdm import tqdm

    bars: dict[str, tqdm[Any]] = {}

    def on_progress(stage: str, done: int, count: int) -> None:
        if stage not in bars:
            bars[stage] = tqdm(total=count, desc=stage, miniters=1)  # parts of a stage may differ much in length
        bars[stage].update(done - bars[stage].n)
        if done >= count:
            bars.pop(stage).close()  # what is shown next, the same stage again too, begins on a line of its own

    try:
        yield on_progress
    finally:
        for bar in bars.values():
            bar.close()


class ProgressLines:
    """Writes lines on standard error, such as `refine layers 12/30, 3:10, about 4:45 left` (time since the beginning).

    A stage of at most 100 parts has a line for each, a longer one for each tenth. A line comes two seconds after the
    one before or later, but the last of a stage always. The time left follows from the latest parts: the first of a
    conversion that goes on are only read. Where the count goes back, another stage of the same name has begun.
    """

    def __init__(self) -> None:
        self.stage: str | None = None
        self.written = -_SECONDS_BETWEEN_LINES

    def __call__(self, stage: str, done: int, count: int) -> None:
        now = time.monotonic()
        if stage != self.stage or done < self.latest[-1][1]:
            self.stage, self.began, self.shown = stage, now, -1
            self.latest: deque[tuple[float, int]] = deque(maxlen=1 + max(5, count // 10))
        self.latest.append((now, done))
        part = done if count <= _MOST_SINGLE_LINES else 10 * done // count
        early = part == self.shown or now < self.written + _SECONDS_BETWEEN_LINES
        if early and done < count:
            return
        self.shown, self.written = part, now
        left = "" if (seconds := self._seconds_left(count)) is None else f", about {_clock(seconds)} left"
        print(f"{stage} {done:,}/{count:,}, {_clock(now - self.began)}{left}", file=sys.stderr, flush=True)

    def _seconds_left(self, count: int) -> float | None:
        """Returns what the rest takes at the pace of the latest parts; None if that is unknown, and at the end."""
        (then, before), (now, done) = self.latest[0], self.latest[-1]
        return (now - then) / (done - before) * (count - done) if before < done < count else None


def _clock(seconds: float) -> str:
    """Returns minutes and seconds, m:ss, or hours too, h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


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

"""An iterator whose items a thread makes ahead of their use."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Iterator
from typing import Any


class Prefetcher:
    """An iterator whose items a thread makes, up to `depth` of them ahead; `next` raises the thread's errors.

    The thread ends when `close` is called or nothing refers to the object any more.
    """

    def __init__(self, items: Iterator[Any], depth: int) -> None:
        self._queue: queue.Queue[Any] = queue.Queue(depth)
        stop = threading.Event()
        thread = threading.Thread(target=_fill, args=(items, self._queue, stop), name="smolseek-prefetch", daemon=True)
        # The thread and its finalizer must not refer to the object: it would never be collected.
        self.close = weakref.finalize(self, _end, thread, stop)
        thread.start()

    def __iter__(self) -> Prefetcher:
        return self

    def __next__(self) -> Any:
        item = self._queue.get()
        if isinstance(item, _Failure):
            self._queue.put(item)  # the thread has ended, so later calls must find the error too
            raise item.error
        return item


class _Failure:
    def __init__(self, error: BaseException) -> None:
        self.error = error


def _fill(items: Iterator[Any], into: queue.Queue[Any], stop: threading.Event) -> None:
    try:
        for item in items:
            if not _put(into, item, stop):
                return
        _put(into, _Failure(StopIteration()), stop)
    except BaseException as error:  # noqa: BLE001  (a panic of tokenizers, too, must reach the caller of next)
        _put(into, _Failure(error), stop)


def _put(into: queue.Queue[Any], item: Any, stop: threading.Event) -> bool:
    """Waits for room in the queue; returns False when the thread must end."""
    while not stop.is_set():
        try:
            into.put(item, timeout=0.2)
        except queue.Full:
            continue
        return True
    return False


def _end(thread: threading.Thread, stop: threading.Event) -> None:
    stop.set()
    if threading.current_thread() is not thread:
        thread.join(timeout=5)  # at exit the thread must end before the libraries that it uses are unloaded

"""Items made ahead of their use, by a thread."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Iterator
from typing import Any


class Ahead:
    """An iterator whose items a thread makes up to `depth` ahead; what goes wrong in the thread is raised by `next`.

    The thread ends when `close` is called, or the object is let go.
    """

    def __init__(self, items: Iterator[Any], depth: int) -> None:
        self._queue: queue.Queue[Any] = queue.Queue(depth)
        stop = threading.Event()
        thread = threading.Thread(target=_make, args=(items, self._queue, stop), name="smolseek-ahead", daemon=True)
        # Neither the thread nor its finalizer may hold the object, or it would never be let go.
        self.close = weakref.finalize(self, _end, thread, stop)
        thread.start()

    def __iter__(self) -> Ahead:
        return self

    def __next__(self) -> Any:
        item = self._queue.get()
        if isinstance(item, _Failure):
            self._queue.put(item)  # for whoever asks again: the thread has ended
            raise item.error
        return item


class _Failure:
    def __init__(self, error: Exception) -> None:
        self.error = error


def _make(items: Iterator[Any], into: queue.Queue[Any], stop: threading.Event) -> None:
    try:
        for item in items:
            if not _put(into, item, stop):
                return
        _put(into, _Failure(StopIteration()), stop)
    except Exception as error:  # noqa: BLE001  (whoever asks for the item must hear of it, whatever it is)
        _put(into, _Failure(error), stop)


def _put(into: queue.Queue[Any], item: Any, stop: threading.Event) -> bool:
    """Wait for room; False once the thread is to end."""
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
        thread.join(timeout=5)  # at exit the libraries that the thread is in must not go before it

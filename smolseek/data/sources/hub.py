"""Hub data sets, streamed; a connection that drops is opened again."""

from __future__ import annotations

import copy
import http.client
import itertools
import logging
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from smolseek.data.documents import EMPTY_DOCUMENT, Columns, Document, document_from_row
from smolseek.data.sources.base import Source, every_document

log = logging.getLogger(__name__)

RETRY_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
"""Waits before a dropped stream is opened again; every row that arrives starts the list anew."""
_SHUFFLE_ROWS = 1000


class SourceLost(ConnectionError):
    """A streamed source could not be opened again, after all waits of `RETRY_SECONDS`."""


class SourceUnreachable(ValueError):
    """A hub data set cannot be opened."""


def parse_spec(spec: str) -> tuple[str, str | None, str | None]:
    """Returns the id, the revision and the config in hub:ID[@REVISION][:CONFIG].

    Raises:
        ValueError: it is not written so.
    """
    match = re.fullmatch(r"hub:([^:@]+)(?:@([^:]+))?(?::(.+))?", spec)
    if not match:
        raise ValueError(f"data source {spec}: a hub data set is written hub:OWNER/NAME[@REVISION][:CONFIG]")
    return match[1], match[2], match[3]


def pinned_spec(spec: str) -> str:
    """Returns a hub data set's spec with its present commit as the revision.

    Returns the spec as it is if it has a revision, is of another source, or the hub cannot be reached.
    """
    if not spec.startswith("hub:"):
        return spec
    name, revision, config = parse_spec(spec)
    if revision:
        return spec
    import huggingface_hub

    try:
        commit = huggingface_hub.HfApi().dataset_info(name, timeout=10).sha
    except Exception as error:
        if not isinstance(error, (ValueError, *_connection_errors())):
            raise
        log.warning("hub:%s: its commit is not known (%s); the run may read another one later", name, _reason(error))
        return spec
    return f"hub:{name}@{commit}" + (f":{config}" if config else "") if commit else spec


class HubSource(Source):
    """A hub data set, streamed by `datasets`; a position is the library's own state.

    When a connection drops it is opened again, after a growing wait, at the row behind the last one that arrived.
    """

    def __init__(self, spec: str, columns: Columns) -> None:
        self.id, self.revision, self.config = parse_spec(spec)
        self.columns = columns

    def whole_records(self, position: Any) -> Iterator[tuple[Any, Document | None]]:
        for next_position, row in self._read_on(self._rows, position):
            if (document := self._document(row)) != EMPTY_DOCUMENT:
                yield next_position, document

    def size(self) -> int | None:
        """Returns the bytes of all columns of the train split, if the data set's page says them.

        Raises:
            SourceUnreachable: the data set cannot be opened.
        """
        import datasets

        builder = self._reach(datasets.load_dataset_builder)
        split = (builder.info.splits or {}).get("train")
        return (split and split.num_bytes) or None

    def sample(
        self, characters: int, *, seed: int, keep: Callable[[Document], bool] = every_document
    ) -> list[Document]:
        """Returns documents as `Source.sample` does, but reads no more rows than it needs, in an order drawn by `seed`.

        The library draws the order of the shards, and shuffles the rows in a buffer.
        """
        drawn: list[Document] = []
        total = 0
        for _, row in self._read_on(lambda position: self._shuffled_rows(position, seed), None):
            document = self._document(row)
            if document is None or document == EMPTY_DOCUMENT:
                continue
            for part in filter(keep, document.parts()):
                drawn.append(part)
                total += len(part.text)
            if total >= characters:
                break
        random.Random(seed).shuffle(drawn)  # the parts of a long text came one after the other
        return drawn

    def _document(self, row: dict[str, Any]) -> Document | None:
        if not {*self.columns} & row.keys():
            raise ValueError(f"data source hub:{self.id}: {self.columns.missing_message(row)}")
        return document_from_row({self.columns.text: None} | row, self.columns)

    def _rows(self, position: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Yields the rows after `position`, each with the position behind it."""
        rows = self._open()
        if position is not None:
            rows.load_state_dict(copy.deepcopy(position))
        for row in rows:
            # The state moves on when the library is asked for a row, so it is read before the next row.
            yield rows.state_dict(), row

    def _shuffled_rows(self, position: int | None, seed: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields shuffled rows, numbered, after the first `position`: the library's state does not keep its buffer."""
        rows = self._open().shuffle(seed=seed, buffer_size=_SHUFFLE_ROWS)
        yield from itertools.islice(enumerate(rows, start=1), position or 0, None)

    def _read_on(
        self, rows_behind: Callable[[Any], Iterator[tuple[Any, dict[str, Any]]]], position: Any
    ) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Yields what `rows_behind(position)` yields, and goes on behind the last row when the connection breaks.

        Raises:
            ValueError: the first opening failed (`SourceUnreachable`), or the library cannot read a shard.
            SourceLost: no row came even after the last wait of `RETRY_SECONDS`.
        """
        failures, opened = 0, False
        while True:
            try:
                for next_position, row in rows_behind(position):
                    position, failures, opened = next_position, 0, True
                    yield position, row
                return
            except Exception as error:
                opened = opened or not isinstance(error, SourceUnreachable)
                if not opened or not isinstance(error, (ValueError, *_connection_errors())):
                    raise
                if isinstance(error, ValueError) and not isinstance(error, SourceUnreachable):
                    raise ValueError(
                        f"data source hub:{self.id}: a shard cannot be read ({_reason(error)}); download its files and "
                        "name them with data.train: of local files malformed lines are skipped"
                    ) from error
                self._wait_or_give_up(failures, error)
                failures += 1

    def _wait_or_give_up(self, failures: int, error: Exception) -> None:
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

        return self._reach(datasets.load_dataset, split="train", streaming=True)

    def _reach(self, load: Callable[..., Any], **options: Any) -> Any:
        """Returns what a function of `datasets` loads of this data set."""
        import datasets

        try:
            return load(self.id, self.config, revision=self.revision, **options)
        except (RuntimeError, ValueError, datasets.exceptions.DatasetsError, *_connection_errors()) as error:
            raise SourceUnreachable(
                f"data source hub:{self.id}: cannot be opened ({_reason(error)}); check the id and the "
                "connection, or name local files"
            ) from error


def _reason(error: Exception) -> str:
    """Returns an error as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _connection_errors() -> tuple[type[Exception], ...]:
    """Returns the errors that the libraries under `datasets` raise for a broken connection or a cut compressed file."""
    clients = {"httpx": "HTTPError", "httpx2": "HTTPError", "aiohttp": "ClientError"}
    # A client that was never imported cannot have raised.
    client_errors = (getattr(sys.modules[module], name) for module, name in clients.items() if module in sys.modules)
    return OSError, EOFError, http.client.HTTPException, *client_errors

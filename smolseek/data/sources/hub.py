"""Hub data sets, streamed; a connection that drops is opened again."""

from __future__ import annotations

import copy
import http.client
import logging
import sys
import time
from collections.abc import Iterator
from typing import Any

from smolseek.data.documents import Columns, Document, document_from_row
from smolseek.data.sources.base import Source

log = logging.getLogger(__name__)

RETRY_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
"""Waits before a dropped stream is opened again; every row that arrives starts the list anew."""


class SourceLost(ConnectionError):
    """A streamed source could not be opened again, after all waits of `RETRY_SECONDS`."""


class SourceUnreachable(ValueError):
    """A hub data set cannot be opened."""


class HubSource(Source):
    """A hub data set, streamed by `datasets`; a position is the library's own state.

    When a connection drops it is opened again, after a growing wait, at the row behind the last one that arrived.
    """

    def __init__(self, spec: str, columns: Columns) -> None:
        _, self.id, *config = spec.split(":")
        self.config, self.columns = (config[0] if config else None), columns

    def records(self, position: Any) -> Iterator[tuple[Any, Document | None]]:
        for next_position, row in self._rows(position):
            if not {*self.columns} & row.keys():
                raise ValueError(f"data source hub:{self.id}: {self.columns.missing_message(row)}")
            document = document_from_row({self.columns.text: None} | row, self.columns)
            if document is None or document.text.strip():
                yield next_position, document

    def _rows(self, position: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Yields the rows after `position`, each with the position behind it.

        Raises:
            ValueError: the first opening failed (`SourceUnreachable`), or the library cannot read a shard.
            SourceLost: no row came even after the last wait of `RETRY_SECONDS`.
        """
        failures, opened = 0, False
        while True:
            try:
                rows = self._open()
                opened = True
                if position is not None:
                    rows.load_state_dict(copy.deepcopy(position))
                for row in rows:
                    # The state moves on when the library is asked for a row, so it is read before the next row.
                    position, failures = rows.state_dict(), 0
                    yield position, row
                return
            except Exception as error:
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

        try:
            return datasets.load_dataset(self.id, self.config, split="train", streaming=True)
        except (OSError, RuntimeError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise SourceUnreachable(
                f"data source hub:{self.id}: cannot be opened ({_reason(error)}); check the id and the "
                "connection, or name local files with --data.train FILE"
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

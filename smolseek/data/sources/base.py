"""The interface of all sources of text, and several sources read one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from smolseek.data.documents import Document


class Source:
    """Records in a fixed order, readable from any saved position."""

    def records(self, position: Any) -> Iterator[tuple[Any, Document | None]]:
        """Yields each record after `position` with the position behind it; the document of a malformed record is None.

        Positions can be written as JSON; None is the beginning.
        """
        raise NotImplementedError

    def documents(self, position: Any) -> Iterator[tuple[Any, Document]]:
        """Yields what `records` yields, without the malformed records."""
        for next_position, document in self.records(position):
            if document is not None:
                yield next_position, document


class ChainedSources(Source):
    """Sources read one after the other; a position is (number of the source, position in it)."""

    def __init__(self, sources: Iterable[Source]) -> None:
        self.sources = list(sources)

    def records(self, position: Any) -> Iterator[tuple[Any, Document | None]]:
        first, inner = position or (0, None)
        for index in range(first, len(self.sources)):
            for next_position, document in self.sources[index].records(inner if index == first else None):
                yield (index, next_position), document

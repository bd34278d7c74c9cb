"""The interface of all sources of text, and several sources read one after the other."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from smolseek.data.documents import Document


def every_document(document: Document) -> bool:
    """Returns True."""
    return True


class Source:
    """Records in a fixed order, readable from any saved position."""

    trouble: str = ""
    """What is wrong with the first malformed record of a file, and what to do; empty if none has been read."""

    def records(self, position: Any) -> Iterator[tuple[Any, Document | None]]:
        """Yields each record after `position` with the position behind it; the document of a malformed record is None.

        A long text gives several records, its parts. Positions can be written as JSON; None is the beginning. The
        position behind a part that is not its text's last is {"before": the position before the text, "parts": n}.
        """
        before, done = position, 0
        if isinstance(position, dict) and position.keys() == {"before", "parts"}:
            before, done = position["before"], position["parts"]
        for after, document in self.whole_records(before):
            parts = [document] if document is None else [*document.parts()]
            for number, part in enumerate(parts[done:], start=done + 1):
                yield (after if number >= len(parts) else {"before": before, "parts": number}), part
            before, done = after, 0

    def whole_records(self, position: Any) -> Iterator[tuple[Any, Document | None]]:
        """Yields what `records` yields, with long texts uncut; blank texts are left out."""
        raise NotImplementedError

    def documents(self, position: Any) -> Iterator[tuple[Any, Document]]:
        """Yields what `records` yields, without the malformed records."""
        for next_position, document in self.records(position):
            if document is not None:
                yield next_position, document

    def size(self) -> int | None:
        """Returns about how many bytes of text the source holds, None if that is not known."""
        raise NotImplementedError

    def sample(
        self, characters: int, *, seed: int, keep: Callable[[Document], bool] = every_document
    ) -> list[Document]:
        """Returns documents drawn evenly from the whole source, in random order, of those that `keep` accepts.

        They have at least `characters` characters together, or are all that the source holds. Memory holds no more than
        them. A seed always gives the same documents.
        """
        draw = random.Random(seed)
        # Each document draws a number; those with the lowest numbers stay, the highest of them first in the heap.
        heap: list[tuple[float, int, Document]] = []
        total = 0
        for number, (_, document) in enumerate(self.documents(None)):
            if keep(document):
                heapq.heappush(heap, (-draw.random(), number, document))
                total += len(document.text)
            while heap and total - len(heap[0][2].text) >= characters:
                total -= len(heapq.heappop(heap)[2].text)
        return [document for _, _, document in sorted(heap, key=lambda entry: -entry[0])]


class ChainedSources(Source):
    """Sources read one after the other; a position is (number of the source, position in it)."""

    def __init__(self, sources: Iterable[Source]) -> None:
        self.sources = list(sources)

    def records(self, position: Any) -> Iterator[tuple[Any, Document | None]]:
        first, inner = position or (0, None)
        for index in range(first, len(self.sources)):
            for next_position, document in self.sources[index].records(inner if index == first else None):
                yield (index, next_position), document
            self.trouble = self.trouble or self.sources[index].trouble

"""Endless shuffled windows of training text, packed without padding; their position can be saved and restored.

Shapes: B windows, T tokens.
"""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from smolseek.config import DataSettings, check_weights
from smolseek.data.encoding import encode_marked, read_marks
from smolseek.data.prefetch import Prefetcher
from smolseek.data.sources import open_sources
from smolseek.data.sources.base import Source
from smolseek.data.splits import is_trained_on

_DOCUMENTS_AT_ONCE = 32  # fewer calls of the tokenizer, each of which uses all cores
_WINDOWS_AHEAD = 64
_NOTHING = torch.empty(0, dtype=torch.int32)


@dataclass(frozen=True)
class SourceProgress:
    """How far a source has been read, and the counts of what was read from it so far."""

    position: Any = None
    epoch: int = 0
    epoch_tokens: int = 0
    tokens: int = 0
    documents: int = 0
    text_bytes: int = 0
    malformed: int = 0


class PackingState(NamedTuple):
    """The state between two windows: the progress of each source, and the unused tokens of the last document."""

    readings: list[SourceProgress]
    rest_T: Tensor


class SourceReader:
    """Reads the training documents of one source as marked tokens, epoch after epoch."""

    def __init__(
        self, source: Source, name: str, tokenizer: Any, settings: DataSettings, progress: SourceProgress
    ) -> None:
        self.source, self.name, self.tokenizer, self.settings = source, name, tokenizer, settings
        self.progress = progress
        self._encoded = self._encode(progress.position)

    def next(self) -> Tensor:
        """Returns the tokens (T,) of the next record; no tokens if it is malformed, held out or the end of an epoch."""
        before = self.progress
        try:
            position, tokens_T, text_bytes = next(self._encoded)
        except StopIteration:
            return self._begin_next_epoch()
        if tokens_T is None:
            self.progress = replace(before, position=position, malformed=before.malformed + 1)
            return _NOTHING
        self.progress = replace(
            before,
            position=position,
            epoch_tokens=before.epoch_tokens + len(tokens_T),
            tokens=before.tokens + len(tokens_T),
            documents=before.documents + (len(tokens_T) > 0),
            text_bytes=before.text_bytes + text_bytes,
        )
        return tokens_T

    def _begin_next_epoch(self) -> Tensor:
        before = self.progress
        if not before.epoch_tokens:
            bad = f" ({before.malformed:,} malformed lines)" if before.malformed else ""
            remedy = self.source.trouble or "name a source with text, or lower data.held_out_share"
            raise ValueError(f"data.train {self.name}: no training text in it{bad}; {remedy}")
        self.progress = replace(before, position=None, epoch=before.epoch + 1, epoch_tokens=0)
        self._encoded = self._encode(None)
        return _NOTHING

    def _encode(self, position: Any) -> Iterator[tuple[Any, Tensor | None, int]]:
        """Yields for each record the position behind it, its tokens (None: malformed) and its UTF-8 bytes."""
        records = iter(self.source.records(position))
        while chunk := list(islice(records, _DOCUMENTS_AT_ONCE)):
            read = [document if document and is_trained_on(document, self.settings) else None for _, document in chunk]
            encoded = encode_marked(self.tokenizer, [document for document in read if document])
            for (next_position, document), trained_on in zip(chunk, read, strict=True):
                if trained_on:
                    yield next_position, next(encoded), len(trained_on.text.encode())
                else:
                    yield next_position, None if document is None else _NOTHING, 0


def packed_windows(
    readers: list[SourceReader], weights: tuple[float, ...], rest_T: Tensor, window_tokens: int
) -> Iterator[tuple[Tensor, PackingState]]:
    """Yields endless windows (T,) in reading order, each with the state behind it.

    The next document comes from the source with the fewest tokens so far relative to its weight.
    """
    while True:
        parts, size = [rest_T], len(rest_T)
        while size < window_tokens:
            shares = [reader.progress.tokens / weight for reader, weight in zip(readers, weights, strict=True)]
            parts.append(readers[shares.index(min(shares))].next())
            size += len(parts[-1])
        rest_T = torch.cat(parts) if len(parts) > 1 else rest_T
        window_T, rest_T = rest_T[:window_tokens], rest_T[window_tokens:]
        yield window_T, PackingState([reader.progress for reader in readers], rest_T)


def source_weights(sources: list[Source], settings: DataSettings) -> tuple[float, ...]:
    """Returns each source's share of the training tokens: `data.weights`, or the sources' sizes.

    Raises:
        ValueError: the weights do not fit the sources, or there are none and a size is unknown or 0.
    """
    check_weights(settings)
    if settings.weights or len(sources) == 1:
        return settings.weights or (1.0,)
    sizes = [source.size() for source in sources]
    for name, size in zip(settings.train, sizes, strict=True):
        if size == 0:
            raise ValueError(f"data.train {name}: is empty; leave it out, or name a source with text")
        if not size:
            raise ValueError(
                f"data.train {name}: its size is not known, and sources are mixed by size; set data.weights"
            )
    return tuple(float(size or 0) for size in sizes)


class WindowStream:
    """Endless windows of T marked tokens from the training split.

    A thread makes them ahead of their use. A buffer shuffles them, and the saved state contains the buffer.

    Raises:
        ValueError: a source does not exist, or the weights do not fit the sources.
    """

    def __init__(self, tokenizer: Any, settings: DataSettings, *, window_tokens: int, seed: int) -> None:
        self.tokenizer, self.settings, self.window_tokens = tokenizer, settings, window_tokens
        self.sources = open_sources(settings.train, settings).sources
        self.weights = source_weights(self.sources, settings)
        self.generator = torch.Generator().manual_seed(seed)
        self.buffer_BT = torch.empty(0, window_tokens, dtype=torch.int32)
        self.packing = PackingState([SourceProgress() for _ in self.sources], _NOTHING)
        self.waited_seconds = 0.0
        """Time spent in `next` so far."""
        self._fetched: deque[tuple[Tensor, PackingState]] = deque()
        self._prefetcher: Prefetcher | None = None

    def next(self, count: int) -> Tensor:
        """Returns the next `count` windows with their marks, (B, T) int64; an error leaves the state unchanged.

        Raises:
            ValueError: the sources hold no text, or they hold conversations and the tokenizer has no chat template.
            SourceLost: a streamed source could not be opened again.
        """
        began = time.perf_counter()
        fill = 0 if len(self.buffer_BT) else max(self.settings.shuffle_windows, 1)
        if self._prefetcher is None:
            self._prefetcher = Prefetcher(self.windows(), depth=max(_WINDOWS_AHEAD, 2 * count))
        self._fetch(fill + count)
        if fill:
            self.buffer_BT = torch.stack([self._take() for _ in range(fill)])
        batch = []
        for _ in range(count):
            pick = int(torch.randint(len(self.buffer_BT), (), generator=self.generator))
            batch.append(self.buffer_BT[pick].long())
            self.buffer_BT[pick] = self._take()
        self.waited_seconds += time.perf_counter() - began
        return torch.stack(batch)

    def _fetch(self, count: int) -> None:
        """Waits until `count` windows are fetched."""
        assert self._prefetcher is not None
        while len(self._fetched) < count:
            self._fetched.append(next(self._prefetcher))

    def _take(self) -> Tensor:
        window_T, self.packing = self._fetched.popleft()
        return window_T

    def windows(self) -> Iterator[tuple[Tensor, PackingState]]:
        """Yields windows (T,) in reading order from the current state on, each with the state behind it."""
        return packed_windows(self._readers(), self.weights, self.packing.rest_T, self.window_tokens)

    def first_tokens(self) -> Iterator[Tensor]:
        """Yields the token ids of each source's first training document.

        Raises:
            ValueError: as `next` does.
        """
        for reader in self._readers():
            tokens_T = _NOTHING
            while not len(tokens_T):
                tokens_T = reader.next()
            yield read_marks(tokens_T[None])[0]

    def _readers(self) -> list[SourceReader]:
        tokenizer = copy.deepcopy(self.tokenizer)  # two threads must not share a tokenizer
        return [
            SourceReader(source, name, tokenizer, self.settings, progress)
            for source, name, progress in zip(self.sources, self.settings.train, self.packing.readings, strict=True)
        ]

    @property
    def malformed(self) -> int:
        """Malformed lines met so far; a line counts again in every epoch."""
        return sum(progress.malformed for progress in self.packing.readings)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Returns what `restore` needs, a part for JSON and tensors, after the windows that `next` has returned."""
        plain = {"readings": [asdict(progress) for progress in self.packing.readings]}
        tensors = {
            "rest": self.packing.rest_T.clone(),
            "buffer": self.buffer_BT.clone(),
            "generator": self.generator.get_state(),
        }
        return plain, tensors

    def restore(self, plain: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Continues exactly where `state` was taken.

        Raises:
            ValueError: the state was taken of another number of sources.
        """
        self.close()
        if len(plain["readings"]) != len(self.sources):
            raise ValueError(
                f"training state of {len(plain['readings'])} sources, and data.train has {len(self.sources)}: an older "
                "smolseek read them one after the other; start over with --force"
            )
        progress = [SourceProgress(**reading) for reading in plain["readings"]]
        self.packing = PackingState(progress, tensors["rest"].clone())
        self.buffer_BT = tensors["buffer"].clone()
        self.generator.set_state(tensors["generator"])

    def close(self) -> None:
        """Ends the thread; the next call of `next` starts a new one."""
        if self._prefetcher is not None:
            self._prefetcher.close()
        self._prefetcher = None
        self._fetched.clear()

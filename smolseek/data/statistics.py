"""Statistics of a recipe's text, without training: documents, tokens, malformed lines, first rows."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import torch

from smolseek.config import Recipe, check_data
from smolseek.data.drawing import held_out_text
from smolseek.data.encoding import read_marks
from smolseek.data.sources import open_sources
from smolseek.data.splits import is_trained_on
from smolseek.data.stream import SourceProgress, SourceReader, packed_windows, source_weights

FIRST_ROWS = 3


@dataclass(frozen=True)
class SourceStatistics:
    """Statistics of the training split of one source."""

    source: str
    documents: int
    tokens: int
    bytes_per_token: float
    malformed: int
    """Malformed lines, skipped."""
    padding_share: float
    """Share of the tokens in packed windows that belong to no document."""
    loss_share: float | None
    """Share of the tokens in packed windows on which loss is taken; below 1 if there are conversations. None if the
    source fills no window."""
    epochs: float | None
    """How often the recipe reads the source; None if the source was not read to its end."""
    complete: bool
    """Whether the source was read to its end."""
    first_rows: list[str]


@dataclass(frozen=True)
class Statistics:
    """Statistics of all sources of a recipe, and of its held-out text as far as an evaluation reads it."""

    sources: list[SourceStatistics]
    held_out_tokens: int
    held_out_bytes: int
    trained_tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as a dict that can be written as JSON."""
        return asdict(self)


def measure_data(recipe: Recipe, tokenizer: Any, *, limit: int, trained_tokens: int) -> Statistics:
    """Reads every training source of a recipe once, but no more than `limit` documents of a hub data set.

    `trained_tokens` are those of the whole run.

    Raises:
        ValueError: a source does not exist or holds no text, or the weights do not fit the sources.
    """
    data = recipe.data
    check_data(data)
    weights = source_weights(open_sources(data.train, data).sources, data)
    sources = [_measure_source(spec, recipe, tokenizer, limit) for spec in data.train]
    ids_T, _, text_bytes = held_out_text(tokenizer, data)
    whole = [s.tokens if s.complete else None for s in sources]
    epochs = _epochs(trained_tokens, whole, weights)
    return Statistics(
        [replace(s, epochs=e) for s, e in zip(sources, epochs, strict=True)], len(ids_T), text_bytes, trained_tokens
    )


def _epochs(trained: int, tokens: Sequence[int | None], weights: Sequence[float]) -> list[float | None]:
    """Returns how often a training on `trained` tokens reads each source, which has its share of them by `weights`."""
    return [t and trained * w / sum(weights) / t for t, w in zip(tokens, weights, strict=True)]


class _ReadEnough(Exception):
    """Raised when the source has been read as far as wanted."""


class _OneEpochReader(SourceReader):
    """Reads a source up to its end, or up to `limit` documents."""

    limit: int | None = None

    def next(self) -> torch.Tensor:
        if self.progress.epoch or (self.limit is not None and self.progress.documents >= self.limit):
            raise _ReadEnough
        return super().next()


def _measure_source(spec: str, recipe: Recipe, tokenizer: Any, limit: int) -> SourceStatistics:
    settings, window_tokens = recipe.data, recipe.train.window_tokens + 1
    source = open_sources((spec,), settings)
    reader = _OneEpochReader(source, spec, tokenizer, settings, SourceProgress())
    reader.limit = limit if spec.startswith("hub:") else None
    slots = learnt = filled = 0
    try:
        for window_T, packing in packed_windows([reader], (1.0,), torch.empty(0, dtype=torch.int32), window_tokens):
            slots, learnt = slots + len(window_T), learnt + int(read_marks(window_T)[1].sum())
            filled = packing.readings[0].tokens - len(packing.rest_T)
    except _ReadEnough:
        pass
    reading = reader.progress
    kept = (document.text for _, document in source.documents(None) if is_trained_on(document, settings))
    return SourceStatistics(
        source=spec,
        documents=reading.documents,
        tokens=reading.tokens,
        bytes_per_token=round(reading.text_bytes / max(1, reading.tokens), 3),
        malformed=reading.malformed,
        padding_share=1 - filled / max(1, slots) if slots else 0.0,
        loss_share=round(learnt / slots, 4) if slots else None,
        epochs=None,
        complete=reading.epoch > 0,
        first_rows=[textwrap.shorten(text[:1000], 100) for text in islice(kept, FIRST_ROWS)],
    )


def render(statistics: Statistics) -> str:
    """Returns the statistics as a table, and below it the first rows of each source."""
    width = max(len(s.source) for s in statistics.sources)
    lines = [
        f"{'':{width}}{'documents':>12}{'tokens':>14}{'bytes/token':>13}{'padding':>9}{'malformed':>11}{'loss on':>9}"
        f"{'epochs':>9}"
    ]
    for s in statistics.sources:
        epochs = "?" if s.epochs is None else f"{s.epochs:.2f}"
        loss = "?" if s.loss_share is None else f"{s.loss_share:.1%}"
        lines.append(
            f"{s.source:{width}}{s.documents:12,}{s.tokens:14,}{s.bytes_per_token:13.2f}{s.padding_share:9.1%}"
            f"{s.malformed:11,}{loss:>9}{epochs:>9}"
        )
    lines += [f"{s.source}: cut at {s.documents:,} documents (--limit)" for s in statistics.sources if not s.complete]
    lines.append(f"The run trains on {statistics.trained_tokens:,} tokens.")
    lines.append(f"Held out: {statistics.held_out_tokens:,} tokens, {statistics.held_out_bytes:,} bytes.")
    for s in statistics.sources:
        lines += ["", f"-- first rows of {s.source}", *s.first_rows]
    return "\n".join(lines)

"""Text drawn over the whole of each source: calibration windows, and the held-out text of a run.

Every source gets its share. A source that has less gives all that it has, and the others give more.

Shapes: B windows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from smolseek.config import DataSettings, check_weights
from smolseek.data.documents import PART_CHARACTERS, Document
from smolseek.data.encoding import encode_text
from smolseek.data.packing import Packed, join, pack
from smolseek.data.sources import PythonSource, open_sources
from smolseek.data.sources.base import Source, every_document
from smolseek.data.splits import is_held_out, is_trained_on

_CHARACTERS_PER_TOKEN = 8  # more than a token has in most texts, so that enough text is drawn
_SPAN_WINDOWS = 2
_MARGIN = 1.2


def calibration_windows(
    tokenizer: Any, data: DataSettings, *, windows: int, window_tokens: int, seed: int
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Returns windows (B, T) of the text in `data.train`, and for each source how much was read of it.

    Documents are drawn with `seed` over each whole source, and of a long one a span at a random place. Sources share
    the windows equally, or by `data.weights`. Documents that `data` holds out are left out; builtin:python always gives
    its training split only.

    Raises:
        ValueError: a source holds less than one window of text, or the weights do not fit the sources.
    """
    check_weights(data, "calibration", "calibration_weights")
    drawn, facts = [], []
    for number, (name, source) in enumerate(zip(data.train, open_sources(data.train, data).sources, strict=True)):
        tokens = windows * window_tokens
        # So much that each span can be of another document.
        enough = max(tokens * _CHARACTERS_PER_TOKEN, windows * PART_CHARACTERS // _SPAN_WINDOWS)
        documents = source.sample(enough, seed=seed + number, keep=_calibrates(source, data))
        generator = torch.Generator().manual_seed(seed + number)
        characters = _MARGIN * _characters_per_token(tokenizer, documents)
        spans = _spans(documents, int(tokens * characters), int(_SPAN_WINDOWS * window_tokens * characters), generator)
        unread = iter(spans)
        ids_T = pack(tokenizer, unread, limit_tokens=tokens).ids_T
        whole = len(ids_T) // window_tokens
        if whole < 1:
            remedy = (not documents and source.trouble) or "name more text"
            raise ValueError(
                f"calibration {name}: {len(ids_T)} tokens, less than one window of {window_tokens}; {remedy}"
            )
        drawn.append(ids_T[: whole * window_tokens].view(whole, window_tokens))
        facts.append({"source": name, "documents": len(spans) - len(list(unread))})
    counts = allocate(windows, data.weights or (1.0,) * len(drawn), [len(part_BT) for part_BT in drawn])
    windows_BT = torch.cat([part_BT[:count] for part_BT, count in zip(drawn, counts, strict=True)])
    order = torch.randperm(len(windows_BT), generator=torch.Generator().manual_seed(seed))
    return windows_BT[order], [fact | {"windows": count} for fact, count in zip(facts, counts, strict=True)]


def held_out_text(tokenizer: Any, data: DataSettings) -> Packed:
    """Returns at most `data.held_out_tokens` tokens that are never trained on, drawn over each whole source.

    The sources are those of `data.held_out`, in equal shares; where there are none, the held-out share of the documents
    of `data.train`.

    Raises:
        ValueError: no tokens are asked for, or a source does not exist.
    """
    specs, tokens = data.held_out or data.train, data.held_out_tokens
    if tokens < 1:
        raise ValueError(f"data.held_out_tokens {tokens}: must be at least 1; leave it out for 65,536")
    streams = []
    for number, source in enumerate(open_sources(specs, data).sources):
        keep = every_document if data.held_out else partial(is_held_out, share=data.held_out_share)
        documents = source.sample(tokens * _CHARACTERS_PER_TOKEN, seed=number, keep=keep)
        streams.append(pack(tokenizer, (document._replace(ends=True) for document in documents), tokens))
    counts = allocate(tokens, (1.0,) * len(streams), [len(stream.ids_T) for stream in streams])
    return join(stream.cut(count) for stream, count in zip(streams, counts, strict=True))


def allocate(wanted: int, weights: Sequence[float], available: Sequence[int]) -> list[int]:
    """Returns how many of `wanted` each source gives: in proportion to its weight, and at most what it has."""
    counts, left = [0] * len(available), min(wanted, sum(available))
    while left:
        having = [i for i, count in enumerate(counts) if count < available[i]]
        total = sum(weights[i] for i in having)
        gives = {i: min(available[i] - counts[i], int(left * weights[i] / total)) for i in having}
        if not any(gives.values()):  # fewer are left than there are sources
            gives = dict.fromkeys(sorted(having, key=lambda i: counts[i] / weights[i])[:left], 1)
        for i, given in gives.items():
            counts[i] += given
        left -= sum(gives.values())
    return counts


def _calibrates(source: Source, data: DataSettings) -> Any:
    """Returns a function that says whether a document may calibrate."""
    if isinstance(source, PythonSource) and not data.held_out:
        share = data.held_out_share or DataSettings().held_out_share
        return partial(is_trained_on, settings=DataSettings(held_out_share=share))
    return partial(is_trained_on, settings=data)


def _characters_per_token(tokenizer: Any, documents: list[Document]) -> float:
    """Returns the mean length of a token in the beginnings of some documents."""
    text = " ".join(document.text[:2000] for document in documents[:8])
    return max(1.0, len(text) / max(1, len(encode_text(tokenizer, text))))


def _spans(documents: list[Document], characters: int, least: int, generator: torch.Generator) -> list[Document]:
    """Returns of each document a span at a random place, so that all spans together have about `characters`.

    A span has `least` characters at least, and begins behind a space. Conversations and short texts stay whole.
    """
    share = characters / max(1, sum(len(document.text) for document in documents))
    return [_span(document, max(least, int(share * len(document.text))), generator) for document in documents]


def _span(document: Document, length: int, generator: torch.Generator) -> Document:
    text, room = document.text, len(document.text) - length
    if document.messages or room <= 0:
        return document._replace(ends=True)
    start = int(torch.randint(room + 1, (), generator=generator))
    space = text.find(" ", start, start + 100) if start else -1
    text = text[space + 1 if space >= 0 else start : start + length]
    return Document(text, text)

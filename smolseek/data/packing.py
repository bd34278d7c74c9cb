"""Documents packed into one stream of tokens, for evaluation and calibration.

Shapes: B windows, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from smolseek.config import DataSettings
from smolseek.data.chat import encode_chat
from smolseek.data.documents import Document
from smolseek.data.encoding import encode_document
from smolseek.data.sources import PythonSource, open_sources
from smolseek.data.splits import is_held_out


class Packed(NamedTuple):
    """One stream of documents."""

    ids_T: Tensor
    """Token ids."""
    counts_T: Tensor
    """Whether the loss on a token counts."""
    text_bytes: int
    """UTF-8 bytes of the text behind the tokens that count."""


def pack(tokenizer: Any, documents: Iterable[Document], limit_tokens: int | None = None) -> Packed:
    """Packs documents into one stream, cut at `limit_tokens`.

    The chat template renders conversations; only the assistant's tokens in them count, as in training.
    """
    ids: list[int] = []
    counts: list[bool] = []
    text_bytes = 0
    for document in documents:
        document_ids, document_counts, size = _encode_whole(tokenizer, document)
        kept = len(document_ids) if limit_tokens is None else min(len(document_ids), limit_tokens - len(ids))
        ids += document_ids[:kept]
        counts += document_counts[:kept]
        text_bytes += round(size * sum(document_counts[:kept]) / max(1, sum(document_counts)))
        if len(ids) == limit_tokens:
            break
    return Packed(torch.tensor(ids, dtype=torch.long), torch.tensor(counts, dtype=torch.bool), text_bytes)


def _encode_whole(tokenizer: Any, document: Document) -> tuple[list[int], list[bool], int]:
    """Returns a document's token ids, whether each counts, and the UTF-8 bytes of the text that counts."""
    if not document.messages:
        ids = encode_document(tokenizer, document.text)
        return ids, [True] * len(ids), len(document.text.encode())
    ids, written = encode_chat(tokenizer, document.messages) or ([], [])
    said = (message["content"] for message in document.messages if message["role"] == "assistant")
    return ids, written, sum(len(content.encode()) for content in said) if ids else 0


def calibration_windows(
    tokenizer: Any, sources: Iterable[str], *, windows: int, window_tokens: int, separator: str, seed: int
) -> Tensor:
    """Returns windows (B, T) of calibration text, drawn with `seed` from the beginning of the sources.

    builtin:python gives its training split only.

    Raises:
        ValueError: the sources hold less than one window of text.
    """
    settings = DataSettings(train=tuple(sources), separator=separator)
    wanted = 4 * windows * window_tokens  # four times what is used, so that one long document does not fill it

    def documents() -> Iterator[Document]:
        for source in open_sources(settings.train, settings).sources:
            for _, document in source.documents(None):
                if not isinstance(source, PythonSource) or not is_held_out(document, settings.held_out_share):
                    yield document

    ids_T = pack(tokenizer, documents(), limit_tokens=wanted).ids_T
    whole = len(ids_T) // window_tokens
    if whole < 1:
        raise ValueError(
            f"calibration {', '.join(settings.train)}: {len(ids_T)} tokens, less than one window of {window_tokens}; "
            "name more text"
        )
    order = torch.randperm(whole, generator=torch.Generator().manual_seed(seed))[:windows]
    return ids_T[: whole * window_tokens].view(whole, window_tokens)[order]

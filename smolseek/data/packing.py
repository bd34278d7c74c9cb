"""Documents packed into one stream of tokens, for evaluation and calibration.

Shapes: T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from smolseek.data.chat import encode_chat
from smolseek.data.documents import Document, message_text
from smolseek.data.encoding import encode_text

_LONGEST_CHARACTERS = 2**22
"""A longer text is encoded in parts, because the tokenizer needs about 200 bytes for each character."""


class Packed(NamedTuple):
    """One stream of documents."""

    ids_T: Tensor
    """Token ids."""
    counts_T: Tensor
    """Whether the loss on a token counts."""
    text_bytes: int
    """UTF-8 bytes of the text behind the tokens that count."""

    def cut(self, tokens: int) -> Packed:
        """Returns the first `tokens` tokens, and the bytes of text in proportion."""
        counts_T = self.counts_T[:tokens]
        share = int(counts_T.sum()) / max(1, int(self.counts_T.sum()))
        return Packed(self.ids_T[:tokens], counts_T, round(self.text_bytes * share))


def join(streams: Iterable[Packed]) -> Packed:
    """Returns several streams as one."""
    ids, counts, sizes = zip(*streams, strict=True)
    return Packed(torch.cat(ids), torch.cat(counts), sum(sizes))


def pack(tokenizer: Any, documents: Iterable[Document], limit_tokens: int | None = None) -> Packed:
    """Packs documents into one stream, cut at `limit_tokens`.

    A text is what `tokenizer(text)` gives. Its BOS parts it from the one before; where the tokenizer adds none, an EOS
    stands between the two. The chat template renders conversations; only the assistant's tokens in them count, as in
    training.
    """
    streams = [Packed(torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.bool), 0)]
    total, after_text = 0, False
    for document in _whole_texts(documents):
        stream = _encode_whole(tokenizer, document)
        if after_text and len(stream.ids_T) and stream.ids_T[0] != tokenizer.bos_token_id:
            stream = join([_separator(tokenizer), stream])
        after_text = not document.messages
        if limit_tokens is not None:
            stream = stream.cut(limit_tokens - total)
        streams.append(stream)
        total += len(stream.ids_T)
        if total == limit_tokens:
            break
    return join(streams)


def _whole_texts(documents: Iterable[Document]) -> Iterator[Document]:
    """Yields documents, the parts of a long text joined again."""
    parts: list[str] = []
    for document in documents:
        if document.messages:
            yield document
            continue
        parts.append(document.text)
        if document.ends or sum(map(len, parts)) >= _LONGEST_CHARACTERS:
            text = "".join(parts)
            yield Document(text, text)
            parts = []
    if parts:
        yield Document("".join(parts), "".join(parts))


def _separator(tokenizer: Any) -> Packed:
    ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return Packed(torch.tensor(ids, dtype=torch.long), torch.ones(len(ids), dtype=torch.bool), 0)


def _encode_whole(tokenizer: Any, document: Document) -> Packed:
    """Returns one document's stream; no tokens for a conversation without anything that the assistant says."""
    if document.messages:
        ids, counts = encode_chat(tokenizer, document.messages) or ([], [])
        said = (message_text(message) for message in document.messages if message["role"] == "assistant")
        size = sum(len(content.encode()) for content in said) if ids else 0
    else:
        ids = encode_text(tokenizer, document.text)
        counts, size = [True] * len(ids), len(document.text.encode())
    return Packed(torch.tensor(ids, dtype=torch.long), torch.tensor(counts, dtype=torch.bool), size)

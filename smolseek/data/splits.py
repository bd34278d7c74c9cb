"""Which documents are trained on, and which are held out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from smolseek.config import DataSettings
from smolseek.data.documents import Document
from smolseek.data.sources import open_sources


def is_held_out(document: Document, share: float) -> bool:
    """Returns whether a document is in the held-out share; a hash of its name alone decides."""
    digest = hashlib.blake2b(document.name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def is_trained_on(document: Document, settings: DataSettings) -> bool:
    """Returns whether a document of the training sources is trained on: all are if held-out sources are named."""
    return bool(settings.held_out) or not is_held_out(document, settings.held_out_share)


def training_documents(settings: DataSettings) -> Iterator[Document]:
    """Yields the documents that are trained on, once each."""
    for _, document in open_sources(settings.train, settings).documents(None):
        if is_trained_on(document, settings):
            yield document


def held_out_documents(settings: DataSettings) -> Iterator[Document]:
    """Yields the documents that are never trained on: the held-out sources, or a share of the training sources.

    Parts of a long text that are held out apart from their neighbours end for themselves.
    """
    for _, document in open_sources(settings.held_out or settings.train, settings).documents(None):
        if settings.held_out:
            yield document
        elif is_held_out(document, settings.held_out_share):
            yield document._replace(ends=True)

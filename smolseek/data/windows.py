"""Documents to token windows: packing without padding, a shuffle buffer of our own, positions that can be saved.

Shapes: N windows, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from smolseek.config import DataSettings
from smolseek.data.corpus import Document, Mixture, PythonSource, is_held_out, open_sources

_CHARACTERS_AT_ONCE = 20_000  # the tokenizer's time and memory grow faster than the length of a single text


def encode_document(tokenizer: Any, text: str, *, end: bool = False) -> list[int]:
    """Token ids of one document, the BOS token in front where the tokenizer has one.

    `end` appends EOS where there is no BOS to tell documents apart; training asks for it, perplexity does not.
    """
    ids = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    pieces = [text[i : i + _CHARACTERS_AT_ONCE] for i in range(0, len(text), _CHARACTERS_AT_ONCE)]
    for piece in tokenizer(pieces, add_special_tokens=False, verbose=False)["input_ids"] if pieces else []:
        ids.extend(piece)
    if end and tokenizer.bos_token_id is None and tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    return ids


def segments(ids_NT: Tensor, tokenizer: Any) -> Tensor:
    """Document number (N, T) of each token in packed windows, counted from the tokens that separate documents."""
    if tokenizer.bos_token_id is not None:
        return (ids_NT == tokenizer.bos_token_id).cumsum(-1)
    if tokenizer.eos_token_id is None:
        return torch.zeros_like(ids_NT)
    ends_NT = ids_NT == tokenizer.eos_token_id
    return ends_NT.cumsum(-1) - ends_NT.long()


class WindowStream:
    """Endless windows of T tokens from the training split, shuffled by a buffer that is part of the saved state."""

    def __init__(self, tokenizer: Any, settings: DataSettings, *, window_tokens: int, seed: int) -> None:
        self.tokenizer, self.settings, self.window_tokens = tokenizer, settings, window_tokens
        self.source = open_settings(settings, settings.train)
        self.generator = torch.Generator().manual_seed(seed)
        self.epoch, self.epoch_tokens = 0, 0
        self.position: Any = None
        self.rest: list[int] = []
        self.buffer_NT = torch.empty(0, window_tokens, dtype=torch.int32)
        self._documents = self.source.documents(None)

    def next(self, count: int) -> Tensor:
        """The next `count` windows, (N, T) int64.

        Raises:
            ValueError: the sources hold no text.
        """
        if not len(self.buffer_NT):
            size = max(self.settings.shuffle_windows, 1)
            self.buffer_NT = torch.stack([self._next_window() for _ in range(size)])
        batch = []
        for _ in range(count):
            pick = int(torch.randint(len(self.buffer_NT), (), generator=self.generator))
            batch.append(self.buffer_NT[pick].long())
            self.buffer_NT[pick] = self._next_window()
        return torch.stack(batch)

    def _next_window(self) -> Tensor:
        while len(self.rest) < self.window_tokens:
            self._read_document()
        window_T = torch.tensor(self.rest[: self.window_tokens], dtype=torch.int32)
        del self.rest[: self.window_tokens]
        return window_T

    def _read_document(self) -> None:
        try:
            self.position, document = next(self._documents)
        except StopIteration:
            if not self.epoch_tokens:
                raise ValueError(
                    f"data.train {', '.join(self.settings.train)}: no training text in it; name a source with text, "
                    "or lower data.held_out_share"
                ) from None
            self.epoch, self.epoch_tokens, self.position = self.epoch + 1, 0, None
            self._documents = self.source.documents(None)
            return
        if self.settings.held_out or not is_held_out(document, self.settings.held_out_share):
            ids = encode_document(self.tokenizer, document.text, end=True)
            self.rest += ids
            self.epoch_tokens += len(ids)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Everything that `restore` needs: a JSON-able part and tensors."""
        plain = {"epoch": self.epoch, "epoch_tokens": self.epoch_tokens, "position": self.position}
        tensors = {
            "rest": torch.tensor(self.rest, dtype=torch.int32),
            "buffer": self.buffer_NT.clone(),
            "generator": self.generator.get_state(),
        }
        return plain, tensors

    def restore(self, plain: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Continue exactly where `state` was taken."""
        self.epoch, self.epoch_tokens, self.position = plain["epoch"], plain["epoch_tokens"], plain["position"]
        self.rest, self.buffer_NT = tensors["rest"].tolist(), tensors["buffer"].clone()
        self.generator.set_state(tensors["generator"])
        self._documents = self.source.documents(self.position)


def held_out_documents(settings: DataSettings) -> Iterator[Document]:
    """The documents that are never trained on: the held-out sources, or the held-out share of the training sources."""
    for _, document in open_settings(settings, settings.held_out or settings.train).documents(None):
        if settings.held_out or is_held_out(document, settings.held_out_share):
            yield document


def pack(tokenizer: Any, documents: Iterable[Document], limit_tokens: int | None = None) -> tuple[Tensor, int]:
    """One stream of token ids (T,) from documents, cut at `limit_tokens`, and the UTF-8 bytes it stands for."""
    ids: list[int] = []
    text_bytes = 0
    for document in documents:
        document_ids = encode_document(tokenizer, document.text)
        size = len(document.text.encode())
        if limit_tokens is not None and len(ids) + len(document_ids) >= limit_tokens:
            kept = limit_tokens - len(ids)
            return torch.tensor(ids + document_ids[:kept]), text_bytes + round(size * kept / len(document_ids))
        ids += document_ids
        text_bytes += size
    return torch.tensor(ids, dtype=torch.long), text_bytes


def calibration_windows(
    tokenizer: Any, sources: Iterable[str], *, windows: int, window_tokens: int, separator: str, seed: int
) -> Tensor:
    """Windows (N, T) of calibration text, drawn with `seed` from the beginning of the sources.

    Of builtin:python only the training split is read.

    Raises:
        ValueError: the sources hold less than one window of text.
    """
    settings = DataSettings(train=tuple(sources), separator=separator)
    wanted = 4 * windows * window_tokens  # drawn from four times what is used, so that one document does not fill it

    def documents() -> Iterator[Document]:
        for source in open_settings(settings, settings.train).sources:
            for _, document in source.documents(None):
                if not isinstance(source, PythonSource) or not is_held_out(document, settings.held_out_share):
                    yield document

    ids_T, _ = pack(tokenizer, documents(), limit_tokens=wanted)
    whole = len(ids_T) // window_tokens
    if whole < 1:
        raise ValueError(
            f"calibration {', '.join(settings.train)}: {len(ids_T)} tokens, less than one window of {window_tokens}; "
            "name more text"
        )
    order = torch.randperm(whole, generator=torch.Generator().manual_seed(seed))[:windows]
    return ids_T[: whole * window_tokens].view(whole, window_tokens)[order]


def open_settings(settings: DataSettings, specs: Iterable[str]) -> Mixture:
    """The named sources, read as the settings say."""
    return open_sources(specs, text_column=settings.text_column, separator=settings.separator)

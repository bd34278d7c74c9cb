"""Documents to token windows: packing without padding, a shuffle buffer of our own, positions that can be saved.

Shapes: N windows, T tokens.

A window's token ids carry two marks, so that they stay with their tokens through the shuffle buffer and checkpoints:
the first token of a document, and tokens on which no loss is taken (what the user says in a conversation).
`read_marks` takes them off.
"""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from smolseek.config import DataSettings
from smolseek.data.ahead import Ahead
from smolseek.data.chat import encode_chat
from smolseek.data.corpus import Columns, Document, Mixture, PythonSource, Source, is_held_out, open_sources

_CHARACTERS_AT_ONCE = 20_000  # the tokenizer's time and memory grow faster than the length of a single text
_DOCUMENTS_AT_ONCE = 32  # one call for many documents: less of it in Python, and the tokenizer uses all cores
_WINDOWS_AHEAD = 64
_FIRST, _NO_LOSS = 1 << 30, 1 << 29
_ID = _NO_LOSS - 1
_NOTHING = torch.empty(0, dtype=torch.int32)


def encode_document(tokenizer: Any, text: str, *, end: bool = False) -> list[int]:
    """Token ids of one document, the BOS token in front where the tokenizer has one.

    `end` appends EOS where there is no BOS to tell documents apart; training asks for it, perplexity does not.
    """
    return next(encode_documents(tokenizer, [text], end=end))


def encode_documents(tokenizer: Any, texts: list[str], *, end: bool = False) -> Iterator[list[int]]:
    """`encode_document` of each text, in one call of the tokenizer."""
    cuts = [range(0, len(text), _CHARACTERS_AT_ONCE) for text in texts]
    pieces = [text[i : i + _CHARACTERS_AT_ONCE] for text, cut in zip(texts, cuts, strict=True) for i in cut]
    encoded = iter(tokenizer(pieces, add_special_tokens=False, verbose=False)["input_ids"] if pieces else [])
    for cut in cuts:
        ids = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        for piece in islice(encoded, len(cut)):
            ids.extend(piece)
        if end and tokenizer.bos_token_id is None and tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        yield ids


def read_marks(windows_NT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of marked windows: token ids, whether loss is taken on each, and the number of its document, all (N, T)."""
    ids_NT, loss_NT = windows_NT & _ID, (windows_NT & _NO_LOSS) == 0
    return ids_NT, loss_NT, ((windows_NT & _FIRST) != 0).cumsum(-1)


@dataclass(frozen=True)
class Reading:
    """How far a source has been read, and what was found there so far."""

    position: Any = None
    epoch: int = 0
    epoch_tokens: int = 0
    tokens: int = 0
    documents: int = 0
    text_bytes: int = 0
    malformed: int = 0


class Packing(NamedTuple):
    """State between two windows: how far each source is, and the tokens that are left of the last document."""

    readings: list[Reading]
    rest_T: Tensor


class Reader:
    """The training documents of one source as marked tokens, epoch after epoch."""

    def __init__(self, source: Source, name: str, tokenizer: Any, settings: DataSettings, reading: Reading) -> None:
        self.source, self.name, self.tokenizer, self.settings = source, name, tokenizer, settings
        self.reading = reading
        self._encoded = self._encode(reading.position)

    def next(self) -> Tensor:
        """Tokens (T,) of the next record; none where it is malformed, held out or the end of an epoch."""
        was = self.reading
        try:
            position, tokens_T, text_bytes = next(self._encoded)
        except StopIteration:
            return self._restart()
        if tokens_T is None:
            self.reading = replace(was, position=position, malformed=was.malformed + 1)
            return _NOTHING
        self.reading = replace(
            was,
            position=position,
            epoch_tokens=was.epoch_tokens + len(tokens_T),
            tokens=was.tokens + len(tokens_T),
            documents=was.documents + (len(tokens_T) > 0),
            text_bytes=was.text_bytes + text_bytes,
        )
        return tokens_T

    def _restart(self) -> Tensor:
        was = self.reading
        if not was.epoch_tokens:
            bad = f" ({was.malformed:,} malformed lines)" if was.malformed else ""
            raise ValueError(
                f"data.train {self.name}: no training text in it{bad}; name a source with text, or lower "
                "data.held_out_share"
            )
        self.reading = replace(was, position=None, epoch=was.epoch + 1, epoch_tokens=0)
        self._encoded = self._encode(None)
        return _NOTHING

    def _encode(self, position: Any) -> Iterator[tuple[Any, Tensor | None, int]]:
        """Per record the position after it, its tokens (None: malformed) and its UTF-8 bytes."""
        records = iter(self.source.records(position))
        while chunk := list(islice(records, _DOCUMENTS_AT_ONCE)):
            read = [document if document and is_trained_on(document, self.settings) else None for _, document in chunk]
            encoded = encode_marked(self.tokenizer, [document for document in read if document])
            for (following, document), trained_on in zip(chunk, read, strict=True):
                if trained_on:
                    yield following, next(encoded), len(trained_on.text.encode())
                else:
                    yield following, None if document is None else _NOTHING, 0


def encode_marked(tokenizer: Any, documents: list[Document]) -> Iterator[Tensor | None]:
    """Marked tokens (T,), int32, of each document; None for a conversation that there is nothing to learn from."""
    texts = encode_documents(tokenizer, [document.text for document in documents if not document.messages], end=True)
    for document in documents:
        if not document.messages:
            yield _mark(next(texts))
        else:
            encoded = encode_chat(tokenizer, document.messages)
            yield _mark(*encoded) if encoded else None


def _mark(ids: list[int], written: list[bool] | None = None) -> Tensor:
    ids_T = torch.tensor(ids, dtype=torch.int32)
    if written is not None:
        ids_T |= _NO_LOSS * ~torch.tensor(written)
    ids_T[:1] |= _FIRST
    return ids_T


def packed_windows(
    readers: list[Reader], weights: tuple[float, ...], rest_T: Tensor, window_tokens: int
) -> Iterator[tuple[Tensor, Packing]]:
    """Endless windows (T,) in the order of reading, each with the state after it.

    The next document comes from the source that has given the fewest tokens for its weight.
    """
    while True:
        parts, size = [rest_T], len(rest_T)
        while size < window_tokens:
            shares = [reader.reading.tokens / weight for reader, weight in zip(readers, weights, strict=True)]
            parts.append(readers[shares.index(min(shares))].next())
            size += len(parts[-1])
        rest_T = torch.cat(parts) if len(parts) > 1 else rest_T
        window_T, rest_T = rest_T[:window_tokens], rest_T[window_tokens:]
        yield window_T, Packing([reader.reading for reader in readers], rest_T)


class WindowStream:
    """Endless windows of T marked tokens from the training split, made ahead by a thread and shuffled by a buffer that
    is part of the saved state.

    Raises:
        ValueError: a source that is not there, or weights that do not fit the sources.
    """

    def __init__(self, tokenizer: Any, settings: DataSettings, *, window_tokens: int, seed: int) -> None:
        self.tokenizer, self.settings, self.window_tokens = tokenizer, settings, window_tokens
        mixture = open_settings(settings, settings.train)
        check_weights(settings)
        self.sources: list[Source] = mixture.sources if settings.weights else [mixture]
        self.generator = torch.Generator().manual_seed(seed)
        self.buffer_NT = torch.empty(0, window_tokens, dtype=torch.int32)
        self.packing = Packing([Reading() for _ in self.sources], _NOTHING)
        self.waited_seconds = 0.0
        """Time spent in `next` so far."""
        self._fetched: deque[tuple[Tensor, Packing]] = deque()
        self._ahead: Ahead | None = None

    def next(self, count: int) -> Tensor:
        """The next `count` windows with their marks, (N, T) int64; when it raises, the state stays as it was.

        Raises:
            ValueError: the sources hold no text, or conversations that the tokenizer has no template for.
            SourceLost: a streamed source stayed away.
        """
        began = time.perf_counter()
        fill = 0 if len(self.buffer_NT) else max(self.settings.shuffle_windows, 1)
        if self._ahead is None:
            self._ahead = Ahead(self.windows(), depth=max(_WINDOWS_AHEAD, 2 * count))
        self._fetch(fill + count)
        if fill:
            self.buffer_NT = torch.stack([self._take() for _ in range(fill)])
        batch = []
        for _ in range(count):
            pick = int(torch.randint(len(self.buffer_NT), (), generator=self.generator))
            batch.append(self.buffer_NT[pick].long())
            self.buffer_NT[pick] = self._take()
        self.waited_seconds += time.perf_counter() - began
        return torch.stack(batch)

    def _fetch(self, count: int) -> None:
        """Have `count` windows at hand."""
        assert self._ahead is not None
        while len(self._fetched) < count:
            self._fetched.append(next(self._ahead))

    def _take(self) -> Tensor:
        window_T, self.packing = self._fetched.popleft()
        return window_T

    def windows(self) -> Iterator[tuple[Tensor, Packing]]:
        """Windows in the order of reading from the state on, each with the state after it."""
        tokenizer = copy.deepcopy(self.tokenizer)  # a tokenizer is not to be shared between threads
        weights = self.settings.weights or (1.0,)
        names = self.settings.train if self.settings.weights else (", ".join(self.settings.train),)
        readers = [
            Reader(source, name, tokenizer, self.settings, reading)
            for source, name, reading in zip(self.sources, names, self.packing.readings, strict=True)
        ]
        return packed_windows(readers, weights, self.packing.rest_T, self.window_tokens)

    @property
    def malformed(self) -> int:
        """Malformed lines met so far, every epoch counted anew."""
        return sum(reading.malformed for reading in self.packing.readings)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Everything that `restore` needs: a JSON-able part and tensors. It is that of the windows handed out."""
        plain = {"readings": [asdict(reading) for reading in self.packing.readings]}
        tensors = {
            "rest": self.packing.rest_T.clone(),
            "buffer": self.buffer_NT.clone(),
            "generator": self.generator.get_state(),
        }
        return plain, tensors

    def restore(self, plain: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Continue exactly where `state` was taken."""
        self.close()
        self.packing = Packing([Reading(**reading) for reading in plain["readings"]], tensors["rest"].clone())
        self.buffer_NT = tensors["buffer"].clone()
        self.generator.set_state(tensors["generator"])

    def close(self) -> None:
        """End the thread; `next` starts another."""
        if self._ahead is not None:
            self._ahead.close()
        self._ahead = None
        self._fetched.clear()


def check_weights(settings: DataSettings) -> None:
    """Refuse weights that are not one positive number for each source."""
    if settings.weights and len(settings.weights) != len(settings.train):
        raise ValueError(
            f"data.weights {list(settings.weights)}: {len(settings.weights)} for {len(settings.train)} sources of "
            "data.train; give each source its own"
        )
    if any(weight <= 0 for weight in settings.weights):
        raise ValueError(f"data.weights {list(settings.weights)}: must be above 0; leave a source out in place of 0")


def is_trained_on(document: Document, settings: DataSettings) -> bool:
    """Whether a document of the training sources is in the training split."""
    return bool(settings.held_out) or not is_held_out(document, settings.held_out_share)


def held_out_documents(settings: DataSettings) -> Iterator[Document]:
    """The documents that are never trained on: the held-out sources, or the held-out share of the training sources."""
    for _, document in open_settings(settings, settings.held_out or settings.train).documents(None):
        if settings.held_out or is_held_out(document, settings.held_out_share):
            yield document


class Packed(NamedTuple):
    """One stream of token ids (T,), whether each one's loss counts (T,), and the UTF-8 bytes that those stand for."""

    ids_T: Tensor
    counts_T: Tensor
    text_bytes: int


def pack(tokenizer: Any, documents: Iterable[Document], limit_tokens: int | None = None) -> Packed:
    """One stream of documents, cut at `limit_tokens`.

    Conversations are rendered by the chat template; of them the assistant's tokens count, as in training.
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
    """Token ids of a document, whether each counts, and the bytes of what does."""
    if not document.messages:
        ids = encode_document(tokenizer, document.text)
        return ids, [True] * len(ids), len(document.text.encode())
    ids, written = encode_chat(tokenizer, document.messages) or ([], [])
    said = (message["content"] for message in document.messages if message["role"] == "assistant")
    return ids, written, sum(len(content.encode()) for content in said) if ids else 0


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

    ids_T = pack(tokenizer, documents(), limit_tokens=wanted).ids_T
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
    columns = Columns(settings.text_column, settings.messages_column)
    return open_sources(specs, columns=columns, separator=settings.separator)

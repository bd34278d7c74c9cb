"""Documents as token ids, with marks where a document begins and where no loss is taken.

Shapes: B windows, T tokens.

The two highest bits of a marked id say that it is the first token of a document, and that no loss is taken on it (a
user's words in a conversation). The marks stay with their tokens in the shuffle buffer and in checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from smolseek.data.chat import encode_chat
from smolseek.data.documents import Document

_CHARACTERS_AT_ONCE = 20_000  # the tokenizer's time and memory grow faster than the length of one text
_FIRST, _NO_LOSS = 1 << 30, 1 << 29
_ID = _NO_LOSS - 1


def encode_document(tokenizer: Any, text: str, *, end: bool = False) -> list[int]:
    """Returns the token ids of one document, after the BOS token if the tokenizer has one.

    With `end`, a tokenizer without BOS appends EOS, so that documents stay apart; only training asks for it.
    """
    return next(encode_documents(tokenizer, [text], end=end))


def encode_documents(tokenizer: Any, texts: list[str], *, end: bool = False) -> Iterator[list[int]]:
    """Yields what `encode_document` returns for each text, in one call of the tokenizer."""
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


def read_marks(windows_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Takes the marks off windows.

    Returns the token ids, whether loss is taken on each token, and the number of each token's document; all (B, T).
    """
    ids_BT, loss_BT = windows_BT & _ID, (windows_BT & _NO_LOSS) == 0
    return ids_BT, loss_BT, ((windows_BT & _FIRST) != 0).cumsum(-1)


def encode_marked(tokenizer: Any, documents: list[Document]) -> Iterator[Tensor | None]:
    """Yields the marked ids (T,), int32, of each document; None for a conversation without anything to learn."""
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

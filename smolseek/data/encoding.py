"""Documents as token ids, with marks where a document begins and where no loss is taken.

Shapes: B windows, T tokens.

The two highest bits of a marked id say that it is the first token of a document, and that no loss is taken on it (a
user's words in a conversation). The marks stay with their tokens in the shuffle buffer and in checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from smolseek.data.chat import encode_chat, render_prompt
from smolseek.data.documents import Document

_FIRST, _NO_LOSS = 1 << 30, 1 << 29
_ID = _NO_LOSS - 1


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Returns the token ids that `tokenizer(text)` gives: with a BOS in front only where the tokenizer adds one."""
    return tokenizer(text, verbose=False)["input_ids"]


def encode_prompt(tokenizer: Any, prompt: str, *, chat: bool = False) -> list[int]:
    """Returns what `encode_text` does; an empty prompt begins with the tokenizer's BOS, if it has one.

    With `chat` the prompt is a user's message, and the ids end where the chat template begins the answer.

    Raises:
        ValueError: there is no chat template, or it refuses the message.
    """
    if chat:
        return render_prompt(tokenizer, [{"role": "user", "content": prompt}])
    ids = encode_text(tokenizer, prompt)
    return ids if ids or tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def added_start(tokenizer: Any) -> list[int]:
    """Returns the BOS that the tokenizer puts in front of every text; nothing if it adds none."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and encode_text(tokenizer, "a")[:1] == [bos] else []


def check_vocabulary(ids: Tensor, vocab_size: int) -> None:
    """Raises ValueError if a token id is beyond the model's vocabulary, as extra tokens of some tokenizers are."""
    if ids.numel() and (largest := int(ids.max())) >= vocab_size:
        raise ValueError(
            f"token {largest}: the model has {vocab_size:,} vocabulary entries, the tokenizer more; leave its added "
            "tokens out of text and chat template, or use the model's own tokenizer"
        )


def check_same_tokens(name: str, tokenizer: Any, ours: Any) -> None:
    """Raises ValueError if a token is another number in the tokenizer of `name` than in ours."""
    theirs, own = tokenizer.get_vocab(), ours.get_vocab()
    if other := sorted(token for token in own.keys() | theirs.keys() if own.get(token) != theirs.get(token)):
        token = other[0]
        raise ValueError(
            f"{name}: token {token!r} is {theirs.get(token)} in its tokenizer, and {own.get(token)} in the model's; "
            "they must share a tokenizer, name another"
        )


def read_marks(windows_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Takes the marks off windows.

    Returns the token ids, whether loss is taken on each token, and the number of each token's document; all (B, T).
    """
    ids_BT, loss_BT = windows_BT & _ID, (windows_BT & _NO_LOSS) == 0
    return ids_BT, loss_BT, ((windows_BT & _FIRST) != 0).cumsum(-1)


def encode_marked(tokenizer: Any, documents: list[Document]) -> Iterator[Tensor | None]:
    """Yields the marked ids (T,), int32, of each document; None for a conversation without anything to learn.

    A text ends in EOS, so that the model learns to stop, unless the next document goes on with it. That one begins as
    every text does all the same, for it may be met without the part before it. All texts are encoded in one call of the
    tokenizer. A conversation is as the chat template renders it.
    """
    texts = [document.text for document in documents if not document.messages]
    encoded = iter(tokenizer(texts, verbose=False)["input_ids"] if texts else [])
    for document in documents:
        if document.messages:
            chat = encode_chat(tokenizer, document.messages)
            yield _mark(*chat) if chat else None
        else:
            yield _mark(_ended(tokenizer, next(encoded)) if document.ends else next(encoded))


def _ended(tokenizer: Any, ids: list[int]) -> list[int]:
    """Returns the ids with EOS behind them, if the tokenizer has one and did not put it there."""
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def _mark(ids: list[int], written: list[bool] | None = None) -> Tensor:
    ids_T = torch.tensor(ids, dtype=torch.int32)
    if written is not None:
        ids_T |= _NO_LOSS * ~torch.tensor(written)
    ids_T[:1] |= _FIRST
    return ids_T

"""Conversations as tokens by the tokenizer's chat template, with a mark on the tokens that the assistant wrote."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

_GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


def encode_chat(tokenizer: Any, messages: Sequence[dict[str, Any]]) -> tuple[list[int], list[bool]] | None:
    """Returns a conversation's token ids, rendered by the chat template, and whether the assistant wrote each token.

    Returns None if the template refuses the conversation, or the assistant wrote nothing in it.

    Raises:
        ValueError: the tokenizer has no chat template.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise ValueError(
            "chat data: the tokenizer has no chat template; name one that has with tokenizer, or read the rows as "
            "text: --data.messages-column none"
        )
    try:
        marked = _GENERATION_MARKER.search(tokenizer.get_chat_template())
        ids, written = (_encode_marked if marked else _encode_by_prefixes)(tokenizer, list(messages))
    except (TemplateError, TypeError):  # an order of roles that the template refuses, or a field that it misses
        return None
    return (ids, written) if any(written) else None


def _encode_marked(tokenizer: Any, messages: list[dict[str, Any]]) -> tuple[list[int], list[bool]]:
    """Uses the generation markers in the template to find the assistant's tokens."""
    encoding = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    return encoding["input_ids"], [bool(written) for written in encoding["assistant_masks"]]


def _encode_by_prefixes(tokenizer: Any, messages: list[dict[str, Any]]) -> tuple[list[int], list[bool]]:
    """Renders the conversation up to each turn; a token that ends in the assistant's turn is the assistant's."""
    render = partial(tokenizer.apply_chat_template, tokenize=False)
    text = render(messages)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    written = [False] * len(text)
    for start, end in _assistant_spans(render, messages, text):
        written[start:end] = [True] * (end - start)
    return encoding["input_ids"], [start < end and written[end - 1] for start, end in encoding["offset_mapping"]]


def _assistant_spans(render: Any, messages: list[dict[str, Any]], text: str) -> list[tuple[int, int]]:
    """Returns (start, end) of the assistant's turns in `text`; each starts behind the generation prompt.

    Some templates write a turn differently once other turns follow (they remove thoughts from the history). Such a turn
    is left out, because the assistant never writes it in that form.
    """
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or index == 0:
            continue
        before = render(messages[:index], add_generation_prompt=True)
        through = render(messages[: index + 1])
        start, end = _common_prefix(through, before), _common_prefix(through, text)
        if message["content"].strip() in text[start:end]:
            spans.append((start, end))
    return spans


def _common_prefix(one: str, other: str) -> int:
    """Returns the length of the common prefix."""
    shorter = min(one, other, key=len)
    if one.startswith(shorter) and other.startswith(shorter):
        return len(shorter)  # nearly always so; the line below is slow
    return next(index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)

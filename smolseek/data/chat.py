"""Conversations as tokens: the tokenizer's chat template, and which tokens the assistant wrote."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

_GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


def encode_chat(tokenizer: Any, messages: Sequence[dict[str, Any]]) -> tuple[list[int], list[bool]] | None:
    """Token ids of a conversation as the chat template renders it, and whether the assistant wrote each.

    None where the template refuses the conversation, or nothing in it is the assistant's.

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
    except (TemplateError, TypeError):  # roles in an order that it does not know, a field that it misses
        return None
    return (ids, written) if any(written) else None


def _encode_marked(tokenizer: Any, messages: list[dict[str, Any]]) -> tuple[list[int], list[bool]]:
    """By the template's own generation markers."""
    encoding = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    return encoding["input_ids"], [bool(written) for written in encoding["assistant_masks"]]


def _encode_by_prefixes(tokenizer: Any, messages: list[dict[str, Any]]) -> tuple[list[int], list[bool]]:
    """By rendering the conversation up to each turn: tokens that end in a turn's characters are the assistant's."""
    render = partial(tokenizer.apply_chat_template, tokenize=False)
    text = render(messages)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    written = [False] * len(text)
    for start, end in _turns(render, messages, text):
        written[start:end] = [True] * (end - start)
    return encoding["input_ids"], [start < end and written[end - 1] for start, end in encoding["offset_mapping"]]


def _turns(render: Any, messages: list[dict[str, Any]], text: str) -> list[tuple[int, int]]:
    """Where in `text` the assistant's turns stand, each from behind the generation prompt to the end of the turn.

    A turn that the template writes differently once more follows (thoughts left out of the history) is left out: as it
    stands the assistant never writes it.
    """
    turns = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or index == 0:
            continue
        before = render(messages[:index], add_generation_prompt=True)
        through = render(messages[: index + 1])
        start, end = _common(through, before), _common(through, text)
        if message["content"].strip() in text[start:end]:
            turns.append((start, end))
    return turns


def _common(one: str, other: str) -> int:
    """Length of the common prefix."""
    shorter = min(one, other, key=len)
    if one.startswith(shorter) and other.startswith(shorter):
        return len(shorter)  # nearly always; the rest is slow
    return next(index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)

"""Conversations as tokens by the tokenizer's chat template, with a mark on the tokens that the assistant wrote."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from smolseek.data.documents import message_text

log = logging.getLogger(__name__)

_GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


_warned_of: set[str] = set()
"""Templates that refused a conversation, of which a warning was logged."""


class _Refusal(Exception):
    """The chat template refuses one conversation, or fails on it."""


def encode_chat(tokenizer: Any, messages: Sequence[dict[str, Any]]) -> tuple[list[int], list[bool]] | None:
    """Returns a conversation's token ids, rendered by the chat template, and whether the assistant wrote each token.

    Returns None if the template refuses the conversation or fails on it (the first time there is a warning), or the
    assistant wrote nothing in it.

    Raises:
        ValueError: the tokenizer has no chat template, or it cannot be parsed.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            "chat data: the tokenizer has no chat template; name a tokenizer that has one, or text that is no "
            "conversation (a recipe reads the rows as text by data.messages_column none)"
        )
    template = tokenizer.get_chat_template()
    try:
        marked = _GENERATION_MARKER.search(template)
        ids, written = (_encode_marked if marked else _encode_by_prefixes)(tokenizer, list(messages))
    except _Refusal as refusal:
        if template not in _warned_of:
            log.warning("chat template: conversations that it refuses are skipped; the first reason: %s", refusal)
            _warned_of.add(template)
        return None
    return (ids, written) if any(written) else None


def render_prompt(tokenizer: Any, messages: Sequence[dict[str, Any]]) -> list[int]:
    """Returns the token ids of a conversation, by the chat template, up to where the assistant's next words begin.

    Raises:
        ValueError: the tokenizer has no chat template, it cannot be parsed, or it refuses the conversation.
    """
    if not tokenizer.chat_template:
        raise ValueError("chat template: the tokenizer has none; use one that has, or give the prompt as text")
    try:
        text = _render(tokenizer, list(messages), add_generation_prompt=True)
    except _Refusal as refusal:
        raise ValueError(
            f"chat template: refuses this conversation ({refusal}); change its messages, or give the prompt as text"
        ) from refusal
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _render(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    """Returns the text of a conversation.

    Raises:
        ValueError: the template cannot be parsed.
        _Refusal: it refuses these messages, or fails on them.
    """
    from jinja2 import TemplateError, TemplateSyntaxError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except TemplateSyntaxError as error:
        raise ValueError(
            f"chat template: cannot be parsed ({_one_line(error.message)}, line {error.lineno}); mend the tokenizer's "
            "chat_template, or name another tokenizer"
        ) from error
    except Exception as error:
        own_words = type(error) is TemplateError and str(error)  # from raise_exception in the template
        raise _Refusal(_one_line(own_words or f"{type(error).__name__}: {error}")) from error


def _one_line(text: str | None) -> str:
    return " ".join(str(text).split())[:200]


def _encode_marked(tokenizer: Any, messages: list[dict[str, Any]]) -> tuple[list[int], list[bool]]:
    """Uses the generation markers in the template to find the assistant's tokens."""
    _render(tokenizer, messages)  # the template's errors apart from the tokenizer's
    encoding = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    return encoding["input_ids"], [bool(written) for written in encoding["assistant_masks"]]


def _encode_by_prefixes(tokenizer: Any, messages: list[dict[str, Any]]) -> tuple[list[int], list[bool]]:
    """Renders the conversation up to each turn; a token that ends in the assistant's turn is the assistant's."""
    render = partial(_render, tokenizer)
    text = render(messages)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    written = [False] * len(text)
    for start, end in _assistant_spans(render, messages, text):
        written[start:end] = [True] * (end - start)
    return encoding["input_ids"], [start < end and written[end - 1] for start, end in encoding["offset_mapping"]]


def _assistant_spans(render: Any, messages: list[dict[str, Any]], text: str) -> list[tuple[int, int]]:
    """Returns (start, end) of the assistant's turns in `text`; each starts behind the generation prompt.

    Some templates write a turn differently once other turns follow (they remove thoughts from the history), and some
    write no calls of tools. Such a turn is left out, because the assistant never writes it in that form.
    """
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or index == 0:
            continue
        before = render(messages[:index], add_generation_prompt=True)
        through = render(messages[: index + 1])
        start, end = _common_prefix(through, before), _common_prefix(through, text)
        if all(words in text[start:end] for words in _words(message)):
            spans.append((start, end))
    return spans


def _words(message: dict[str, Any]) -> list[str]:
    """Returns what a turn must hold to be the assistant's: its content and the names of the tools that it calls."""
    calls = [call for call in message.get("tool_calls") or [] if isinstance(call, dict)]
    functions = [call["function"] if isinstance(call.get("function"), dict) else call for call in calls]
    return [message_text(message).strip(), *(str(function.get("name", "")) for function in functions)]


def _common_prefix(one: str, other: str) -> int:
    """Returns the length of the common prefix."""
    shorter = min(one, other, key=len)
    if one.startswith(shorter) and other.startswith(shorter):
        return len(shorter)  # nearly always so; the line below is slow
    return next(index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)

"""Documents, and how they are made from the rows of JSON Lines, Parquet files and hub data sets."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple


class Document(NamedTuple):
    """One text or one conversation."""

    name: str
    """A hash of the name decides whether the document is held out."""
    text: str
    """The text; of a conversation the contents of its messages, one below the other."""
    messages: tuple[dict[str, Any], ...] = ()
    """The messages of a conversation; empty for a plain text."""
    ends: bool = True
    """False for a part of a long text that the next document goes on with."""


EMPTY_DOCUMENT = Document("", "")


class Columns(NamedTuple):
    """The columns that hold a row's text and its conversation; a row that has both is a conversation."""

    text: str = "text"
    messages: str = "messages"

    def missing_message(self, there: Iterable[str]) -> str:
        """Returns the end of an error message about rows that have neither column."""
        return f"no column {self.text!r} or {self.messages!r}; it has {', '.join(there)}: set data.text_column"


def document_from_row(row: Any, columns: Columns) -> Document | None:
    """Returns the document of a row: an empty one where the text is null, None where the row is malformed."""
    if not isinstance(row, dict):
        return None
    messages = row.get(columns.messages)
    if messages is not None:
        return _conversation(messages)
    text = row.get(columns.text, 0)
    if text is None:
        return EMPTY_DOCUMENT
    return Document(text, text) if _is_text(text) else None


def _conversation(messages: Any) -> Document | None:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return None
    if not all(_is_text(message.get(key)) for message in messages for key in ("role", "content")):
        return None
    text = "\n".join(message["content"] for message in messages)
    # A columnar file gives each message the keys of all messages; a key without a value was not written.
    kept = ({key: value for key, value in message.items() if value is not None} for message in messages)
    return Document(text, text, tuple(kept))


def _is_text(value: Any) -> bool:
    """Returns whether the value is a string that UTF-8 can write (JSON can spell half a surrogate pair)."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False

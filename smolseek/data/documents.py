"""Documents, and how they are made from the rows of JSON Lines, Parquet files and hub data sets."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from smolseek.formats.text import is_text

LONGEST_TEXT = 65_536
"""Characters of the longest text that stays one document; a longer one is cut into parts."""
PART_CHARACTERS = 32_768
"""Characters of the longest part."""


class Document(NamedTuple):
    """One text, one part of a long text, or one conversation."""

    name: str
    """A hash of the name decides whether the document is held out. A text without a name is named by itself, and so is
    each part of it: a long text is divided among training and held-out. The parts of a named one stay together."""
    text: str
    """The text; of a conversation the contents of its messages, one below the other."""
    messages: tuple[dict[str, Any], ...] = ()
    """The messages of a conversation; empty for a plain text. A message that calls tools may have the content None."""
    ends: bool = True
    """Whether the text ends here; False for a part that the next document continues."""

    def parts(self) -> Iterator[Document]:
        """Yields the document itself, or the parts of a long text, which joined are the text."""
        if self.messages or len(self.text) <= LONGEST_TEXT:
            yield self
        else:
            for part, ends in cut_texts([(self.text, True)]):
                yield Document(part if self.name == self.text else self.name, part, ends=ends)


EMPTY_DOCUMENT = Document("", "")


class Columns(NamedTuple):
    """The columns that hold a row's text and its conversation; a row that has both is a conversation."""

    text: str = "text"
    messages: str = "messages"

    def missing_message(self, there: Iterable[str]) -> str:
        """Returns the end of an error message about rows that have neither column."""
        names = textwrap.shorten(", ".join(there), 200, placeholder=" ...") or "none"
        return (
            f"no column {self.text!r} or {self.messages!r}; it has {names}: set data.text_column, or rename one to "
            f"{self.text}"
        )

    def trouble(self, row: Any) -> str:
        """Returns what is wrong with a row that gives no document, and what to do."""
        if not isinstance(row, dict):
            return "no JSON object; write one JSON object a line"
        if not {*self} & row.keys():
            return self.missing_message(row)
        return f"no text in {self.text!r} or messages in {self.messages!r}; correct it"


def cut_texts(pieces: Iterable[tuple[str, bool]]) -> Iterator[tuple[str, bool]]:
    """Yields texts of up to `LONGEST_TEXT` characters whole and longer ones in parts, each with whether the text ends.

    The texts come in pieces of any size, each with whether it ends its text. Memory holds one piece and `LONGEST_TEXT`
    characters more, and the parts do not depend on the pieces.
    """
    rest, was_cut = "", False
    for piece, ends in pieces:
        rest, start = rest + piece, 0
        while len(rest) - start > (PART_CHARACTERS if was_cut else LONGEST_TEXT):
            stop = _end_of_part(rest, start)
            yield rest[start:stop], False
            start, was_cut = stop, True
        rest = rest[start:]
        if ends:
            yield rest, True
            rest, was_cut = "", False


def _end_of_part(text: str, start: int) -> int:
    """Returns where the part from `start` ends: at the last blank line, line end or space of its second half, if any.

    A space begins the next part, because tokens begin with spaces.
    """
    half, end = start + PART_CHARACTERS // 2, start + PART_CHARACTERS
    for mark, kept in (("\n\n", 2), ("\n", 1), (" ", 0)):
        if (found := text.rfind(mark, half, end)) >= 0:
            return found + kept
    return end


def document_from_row(row: Any, columns: Columns) -> Document | None:
    """Returns the document of a row: `EMPTY_DOCUMENT` where the text is null or blank, None where it is malformed."""
    if not isinstance(row, dict):
        return None
    messages = row.get(columns.messages)
    if messages is not None:
        return _conversation(messages)
    text = row.get(columns.text, 0)
    if text is None:
        return EMPTY_DOCUMENT
    return text_document(text) if is_text(text) else None


def text_document(text: str) -> Document:
    """Returns a text as a document named by itself; a blank text as `EMPTY_DOCUMENT`."""
    return Document(text, text) if text.strip() else EMPTY_DOCUMENT


def message_text(message: dict[str, Any]) -> str:
    """Returns the content of a conversation's message as text; a message that only calls tools has none."""
    return message.get("content") or ""


def _conversation(messages: Any) -> Document | None:
    if not isinstance(messages, list):
        return None
    read = tuple(kept for message in messages if (kept := _message(message)))
    if len(read) < len(messages):
        return None
    text = "\n".join(map(message_text, read))
    says_something = text.strip() or any(message.get("tool_calls") for message in read)
    return Document(text, text, read) if says_something else EMPTY_DOCUMENT


def _message(message: Any) -> dict[str, Any] | None:
    """Returns a message as the chat template gets it, None if its role or content cannot be used.

    A list of text parts becomes one text. The content may be null where tools are called.
    """
    if not isinstance(message, dict):
        return None
    # A columnar file gives each message the keys of all messages; a key without a value was not written.
    kept = {key: value for key, value in message.items() if value is not None}
    content = _joined_parts(kept.get("content"))
    calls = kept.get("tool_calls")
    if content is None and not (isinstance(calls, list) and calls):
        return None
    kept["content"] = content
    usable = is_text(kept.get("role")) and isinstance(content, str | None)
    return kept if usable and is_text(json.dumps(kept, ensure_ascii=False, default=str)) else None


def _joined_parts(content: Any) -> Any:
    """Returns a list of text parts as one text, anything else as it is."""
    if not isinstance(content, list):
        return content
    parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
    texts = [part["text"] for part in parts if isinstance(part.get("text"), str)]
    return "".join(texts) if len(texts) == len(content) else content

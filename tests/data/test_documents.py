import pytest
from hypothesis import given
from hypothesis import strategies as st

from smolseek.data import documents
from smolseek.data.documents import EMPTY_DOCUMENT, Columns, Document, cut_texts, document_from_row, message_text

CALLS = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}]
CALL = {"role": "assistant", "content": None, "tool_calls": CALLS}


def small(patch, longest=12, part=6):
    patch.setattr(documents, "LONGEST_TEXT", longest)
    patch.setattr(documents, "PART_CHARACTERS", part)


@given(st.lists(st.text("ab \n", max_size=60)), st.lists(st.integers(1, 9), min_size=1))
def test_parts_joined_are_the_text_however_it_comes(texts, sizes):
    with pytest.MonkeyPatch.context() as patch:
        small(patch)
        pieces = []
        for text in texts:
            start = 0
            for number in range(len(text)):
                piece = text[start : start + sizes[number % len(sizes)]]
                pieces.append((piece, False))
                start += len(piece)
            pieces.append(("", True))
        parts = list(cut_texts(pieces))
        assert parts == list(cut_texts((text, True) for text in texts))
    joined = [""]
    for part, ends in parts:
        joined[-1] += part
        if ends:
            joined.append("")
    assert joined[:-1] == texts
    assert all(len(part) <= 6 for part, ends in parts if part not in texts or not ends)
    assert all(len(part) >= 3 for part, ends in parts if not ends)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("one\n\ntwo\nthree four", "one\n\n"),  # a blank line goes before a line end
        ("one\nt wo three", "one\n"),  # a line end before a space
        ("a bcd efg hijkl", "a bcd"),  # a space begins the next part
        ("a bcdefghijklm", "a bcde"),  # the space is in the first half
        ("abcdefghijklmn", "abcdef"),
    ],
)
def test_where_a_part_ends(monkeypatch, text, part):
    small(monkeypatch)
    first, *_, last = Document(text, text).parts()
    assert first == Document(part, part, ends=False) and last.ends
    assert {part.name for part in Document("name", text).parts()} == {"name"}  # and so is held out whole, or not at all


def test_what_is_not_cut():
    text = "word " * 20_000
    assert list(Document("n", text[:65_536]).parts()) == [Document("n", text[:65_536])]
    assert len(list(Document("n", text[:65_537]).parts())) == 3
    conversation = Document(text, text, ({"role": "user", "content": text},))
    assert list(conversation.parts()) == [conversation]


def conversation_of(*messages):
    return document_from_row({"messages": list(messages)}, Columns())


def test_text_parts_of_a_message_are_one_text():
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "that?", "image": None}]
    document = conversation_of({"role": "user", "content": parts}, {"role": "assistant", "content": "A cat."})
    assert document.text == "What is that?\nA cat."
    assert document.messages[0] == {"role": "user", "content": "What is that?"}


def test_calls_of_tools_and_their_results_are_kept():
    question, result = {"role": "user", "content": "Rain?"}, {"role": "tool", "content": "No.", "name": "weather"}
    document = conversation_of(question, CALL | {"refusal": None}, result)
    assert document.text == "Rain?\n\nNo."
    assert document.messages == (question, CALL, result)
    assert [message_text(message) for message in document.messages] == ["Rain?", "", "No."]
    without_key = {key: value for key, value in CALL.items() if key != "content"}
    assert conversation_of(question, without_key, result) == document
    assert conversation_of(CALL).messages == (CALL,)


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": [{"type": "text", "text": "What is"}, {"type": "image", "url": "a.png"}]},
        {"role": "user", "content": [{"type": "text", "text": None}]},
        {"role": "user", "content": {"text": "a"}},
        {"role": "user", "content": None},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "assistant", "content": None, "tool_calls": "weather"},
        {"role": None, "content": "a"},
        {"content": "a"},
        {"role": "assistant", "content": "a", "name": "half a pair \ud800"},
        "a",
    ],
)
def test_messages_that_cannot_be_used(message):
    assert conversation_of({"role": "user", "content": "a"}, message) is None


@pytest.mark.parametrize(
    "row",
    [
        {"text": None},
        {"text": " \n"},
        {"messages": []},
        {"messages": [{"role": "user", "content": " "}, {"role": "assistant", "content": []}]},
    ],
)
def test_rows_without_words(row):
    assert document_from_row(row, Columns()) == EMPTY_DOCUMENT

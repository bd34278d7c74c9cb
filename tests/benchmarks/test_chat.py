"""Ten questions to a tiny model."""

import copy

import chat
import pytest
from chat import QUESTIONS, Chat, main

from smolseek.checkpoint.hub import save
from smolseek.model import StockModel
from tests.factories import tiny_llama, tiny_v3
from tests.text import ENTRIES, tiny_tokenizer

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture
def tokenizer():
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_every_model_answers_every_question(tmp_path, tokenizer, capsys):
    limits = {"vocab_size": ENTRIES, "max_position_embeddings": 128}
    save(StockModel(tiny_llama(**limits)), tmp_path / "a", tokenizer_from=tokenizer)
    save(tiny_v3(**limits), tmp_path / "b", tokenizer_from=tokenizer)
    folders = (f"dense={tmp_path / 'a'}", f"converted={tmp_path / 'b'}")
    assert main(Chat(folders, max_new_tokens=4, out="tiny", results=tmp_path / "results")) == 0
    (written,) = (tmp_path / "results").iterdir()
    text = written.read_text(encoding="utf-8")
    assert written.name.endswith("-chat-tiny.md") and text in capsys.readouterr().out
    assert text.count("\n**dense**\n") == text.count("\n**converted**\n") == len(QUESTIONS) == 10


def test_no_answer_is_shown_as_such():
    assert "> (nothing)" in chat.render({"dense": [""] * 10}, 4)


@pytest.mark.parametrize(("folders", "words"), [((), "NAME=FOLDER"), (("a",), "NAME=FOLDER"), (("a=gone",), "gone")])
def test_mistakes_are_one_line(folders, words, tmp_path, capsys):
    assert main(Chat(folders, results=tmp_path)) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1

import json

import pyarrow
import pyarrow.parquet
import pytest

from smolseek.data.documents import Columns, Document
from smolseek.data.sources import open_source
from tests.data.sources.reading import texts
from tests.text import stories


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_every_file_type_gives_the_same_documents(files, name):
    assert texts(open_source(str(files / name))) == stories(10)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "*.jsonl"])
def test_a_source_continues_from_every_position(files, name):
    source = open_source(str(files / name))
    everything = list(source.documents(None))
    for number, (position, _) in enumerate(everything, start=1):
        position = json.loads(json.dumps(position))  # as a checkpoint keeps it
        assert texts(source, position) == [document.text for _, document in everything[number:]]


def test_a_file_longer_than_a_block_is_cut_at_separators_only(tmp_path):
    long = ["x" * 700_000, "y" * 1_100_000, "z"]
    (tmp_path / "long.txt").write_text("<|sep|>".join(long))
    assert texts(open_source(str(tmp_path / "long.txt"), separator="<|sep|>")) == long


BAD_LINES = [
    "not json",
    '{"other": 1}',
    '{"text": 5}',
    "[1, 2]",
    '{"text": "half a pair \\ud800"}',
    "[" * 100_000,
    "1" * 5000,
    '{"messages": "hello"}',
    '{"messages": [{"role": "user"}]}',
    '{"messages": [{"role": "user", "content": ["parts"]}]}',
]


def test_malformed_lines_are_skipped_counted_and_warned_of_once_a_file(tmp_path, caplog):
    lines = ['{"text": "good"}', *BAD_LINES, "", '{"text": null}', '{"text": "too"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.jsonl").write_text("{}\n{}")
    source = open_source(str(tmp_path / "*.jsonl"))
    assert texts(source) == ["good", "too"]
    assert sum(document is None for _, document in source.records(None)) == len(BAD_LINES) + 2
    caplog.clear()
    list(source.records(None))
    assert len(caplog.records) == 2 and "a.jsonl line 2:" in caplog.text and "b.jsonl line 1:" in caplog.text


def test_every_record_continues_from_its_position(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(['{"text": "good"}', *BAD_LINES, '{"text": "too"}']))
    source = open_source(str(tmp_path / "a.jsonl"))
    everything = list(source.records(None))
    for number, (position, _) in enumerate(everything, start=1):
        assert list(source.records(json.loads(json.dumps(position)))) == everything[number:]


CONVERSATION = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]


def test_rows_with_messages_are_conversations(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": CONVERSATION, "text": "as text"}) + '\n{"text": "plain"}')
    rows = [{"messages": [message | {"name": None} for message in CONVERSATION]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    chat, plain = (document for _, document in open_source(str(tmp_path / "a.jsonl")).documents(None))
    assert list(chat.messages) == CONVERSATION and chat.text == "What?\nThat."
    assert plain == Document("plain", "plain")
    (_, columnar), *_ = open_source(str(tmp_path / "a.parquet")).documents(None)
    assert columnar == chat
    assert texts(open_source(str(tmp_path / "a.jsonl"), columns=Columns(messages="none"))) == ["as text", "plain"]


def test_unknown_file_type(tmp_path):
    (tmp_path / "a.csv").write_text("a")
    with pytest.raises(ValueError, match=r"\.csv is not \.txt, \.jsonl, \.parquet"):
        open_source(str(tmp_path / "a.csv"))


def test_a_parquet_file_without_the_column_names_those_it_has(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"'text' or 'messages'; it has body"):
        texts(open_source(str(tmp_path / "a.parquet")))

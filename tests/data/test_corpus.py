import itertools
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from smolseek.data.corpus import (
    Columns,
    Document,
    HubSource,
    SourceLost,
    Unreachable,
    is_held_out,
    open_source,
    open_sources,
)
from tests.data.hub_server import FlakyHub
from tests.text import stories, write_stories

ROOT = Path(__file__).parents[2]


def texts(source, position=None):
    return [document.text for _, document in source.documents(position)]


@pytest.fixture
def files(tmp_path):
    """The same stories as .txt, .jsonl and .parquet."""
    lines = stories(10)
    write_stories(tmp_path / "a.txt", 10)
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    pyarrow.parquet.write_table(pyarrow.table({"text": lines}), tmp_path / "a.parquet")
    return tmp_path


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


def test_several_sources_are_one(files):
    source = open_sources([str(files / "a.txt"), str(files / "a.jsonl")])
    assert texts(source) == stories(10) * 2
    position, _ = next(itertools.islice(source.documents(None), 11, None))
    assert texts(source, json.loads(json.dumps(position))) == stories(10)[2:]


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


def test_the_hub_source_continues_from_its_position(files, monkeypatch):
    import datasets

    rows = datasets.load_dataset("parquet", data_files=str(files / "a.parquet"), split="train", streaming=True)
    source = HubSource("hub:someone/something:config", Columns())
    monkeypatch.setattr(source, "_open", lambda: rows)
    everything = list(source.documents(None))
    assert [document.text for _, document in everything] == stories(10)
    position = json.loads(json.dumps(everything[3][0]))
    rows = datasets.load_dataset("parquet", data_files=str(files / "a.parquet"), split="train", streaming=True)
    assert texts(source, position) == stories(10)[4:]


READ_ALL = """
import functools, time
import datasets, fsspec
from smolseek.data.corpus import Columns, HubSource
time.sleep = lambda seconds: None  # the libraries' own waits too
datasets.config.STREAMING_READ_MAX_RETRIES = 1
# Small reads, so that a small shard is cut within.
fsspec.spec.AbstractBufferedFile.DEFAULT_BLOCK_SIZE = 1 << 12
datasets.load_dataset = functools.partial(datasets.load_dataset, chunksize=1 << 12)
for _, document in HubSource("hub:someone/text", Columns()).documents(None):
    print(document.text)
"""


def test_a_stream_that_breaks_off_mid_shard_loses_and_repeats_nothing(tmp_path):
    """The real libraries against a server that closes the connection; each gives up before we open again."""
    rows = [f"shard {shard} row {row} " + str(row) * 20 for shard in range(2) for row in range(400)]
    lines = [json.dumps({"text": row}) + "\n" for row in rows]
    files = {f"data/train-{shard}.jsonl": "".join(lines[shard * 400 :][:400]).encode() for shard in range(2)}
    middle = len(files["data/train-0.jsonl"]) // 2
    server = FlakyHub(files, {"data/train-0.jsonl": [middle] * 14, "data/train-1.jsonl": [middle // 2] * 7})
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = os.environ | {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", READ_ALL], capture_output=True, text=True, env=environment, check=False
    )
    server.shutdown()
    server.server_close()
    assert result.stdout.splitlines() == rows, result.stderr
    assert not any(server.breaks.values())
    assert result.stderr.count("read on in") >= 3
    assert any(first > 0 for _, first, broken in server.served if broken)


def hub_source_of(monkeypatch, opened):
    """A hub source whose data sets are those that `opened` gives, one an opening."""
    source = HubSource("hub:someone/text", Columns())
    monkeypatch.setattr("smolseek.data.corpus.RETRY_SECONDS", (0.0, 0.0, 0.0))
    monkeypatch.setattr(source, "_open", lambda: next(opened)())
    return source


class BrokenRows:
    """Rows of numbers that break off after some."""

    def __init__(self, count, error):
        self.count, self.error, self.first = count, error, 0

    def load_state_dict(self, state):
        self.first = state["next"]

    def state_dict(self):
        return {"next": self.first}

    def __iter__(self):
        for number in range(self.first + 1, min(self.first + self.count, 20) + 1):
            self.first = number
            yield {"text": str(number)}
        if self.first < 20:
            raise self.error


@pytest.mark.parametrize("error", [ConnectionResetError("reset"), TimeoutError(), EOFError(), Unreachable("no hub")])
def test_every_break_is_read_on_from(monkeypatch, error):
    source = hub_source_of(monkeypatch, itertools.repeat(lambda: BrokenRows(3, error)))
    everything = list(source.documents(None))
    assert [document.text for _, document in everything] == [str(number) for number in range(1, 21)]
    for number, (position, _) in enumerate(everything, start=1):
        assert len(texts(source, position)) == 20 - number


def test_a_stream_that_stays_away_is_given_up_after_a_number_of_attempts(monkeypatch, caplog):
    def refuse():
        raise Unreachable("no hub")

    opened = iter([lambda: BrokenRows(3, OSError("gone")), *[refuse] * 9])
    documents = hub_source_of(monkeypatch, opened).documents(None)
    assert [next(documents)[1].text for _ in range(3)] == ["1", "2", "3"]
    with pytest.raises(SourceLost, match=r"hub:someone/text: lost, and 3 attempts .* --resume") as raised:
        next(documents)
    assert "\n" not in str(raised.value) and len(caplog.records) == 3
    assert len(list(opened)) == 6


def test_a_shard_that_the_library_cannot_read_is_one_line(tmp_path, monkeypatch):
    import datasets

    (tmp_path / "a.jsonl").write_text("{broken")
    options = {"data_files": str(tmp_path / "a.jsonl"), "split": "train", "streaming": True}
    opened = iter([lambda: datasets.load_dataset("json", **options)])
    with pytest.raises(ValueError, match="shard cannot be read") as raised:
        texts(hub_source_of(monkeypatch, opened))
    assert "\n" not in str(raised.value)


def test_errors_that_no_connection_makes_are_not_tried_again(monkeypatch):
    opened = iter([lambda: BrokenRows(3, KeyError("bug"))])
    with pytest.raises(KeyError):
        texts(hub_source_of(monkeypatch, opened))


def test_an_unreachable_hub_is_one_line_with_the_remedy(monkeypatch):
    import datasets

    def refuse(*_args, **_options):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ValueError, match=r"hub:someone/text: .*--data.train") as raised:
        next(open_source("hub:someone/text").documents(None))
    assert "\n" not in str(raised.value)


def test_python_carries_reference_and_sources():
    documents = [document for _, document in open_source("builtin:python").documents(None)]
    names = {document.name for document in documents}
    assert {"topic assignment", "module json.decoder", "module argparse"} <= names
    assert not [name for name in names if ".test" in name or "encodings" in name]
    assert sum(len(document.text) for document in documents) > 5_000_000


def test_a_tenth_is_held_out_by_name():
    documents = [document for _, document in open_source("builtin:python").documents(None)]
    held_out = [document for document in documents if is_held_out(document, 0.1)]
    assert 0.05 < len(held_out) / len(documents) < 0.15
    assert is_held_out(Document("topic assignment", "any text"), 0.1)
    assert not is_held_out(Document("module argparse", ""), 0.1)
    assert not is_held_out(documents[0], 0.0) and is_held_out(documents[0], 1.0)


@pytest.mark.parametrize(
    ("spec", "words"),
    [("nowhere.txt", "no such file"), ("builtin:java", "builtin:python")],
)
def test_sources_that_are_not_there(spec, words):
    with pytest.raises(ValueError, match=words):
        open_source(spec)


def test_unknown_file_type(tmp_path):
    (tmp_path / "a.csv").write_text("a")
    with pytest.raises(ValueError, match=r"\.csv is not \.txt, \.jsonl, \.parquet"):
        open_source(str(tmp_path / "a.csv"))


def test_a_parquet_file_without_the_column_names_those_it_has(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"'text' or 'messages'; it has body"):
        texts(open_source(str(tmp_path / "a.parquet")))

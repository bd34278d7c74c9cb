import json
import tempfile
import time
import tracemalloc
from contextlib import contextmanager
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smolseek.data import documents
from smolseek.data.documents import Columns, Document
from smolseek.data.sources import files as files_module
from smolseek.data.sources import open_source
from smolseek.formats.text import open_text
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


@given(st.lists(st.text("ab\n <>", max_size=90)), st.integers(1, 40), st.sampled_from(["<>", "a", "<a<a>"]))
def test_the_texts_of_a_file_do_not_depend_on_blocks(written, block, separator):
    whole = separator.join(written)
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(files_module, "_BLOCK_CHARACTERS", block)
        patch.setattr(documents, "LONGEST_TEXT", 20)
        patch.setattr(documents, "PART_CHARACTERS", 10)
        (Path(folder) / "a.txt").write_text(whole)
        records = [document for _, document in open_source(f"{folder}/a.txt", separator=separator).records(None)]
    assert joined(records) == [text.strip("\n") for text in whole.split(separator) if text.strip()]
    assert all(document.name == document.text for document in records)


def joined(records):
    """Returns the whole texts that documents are parts of."""
    whole, rest = [], ""
    for document in records:
        rest += document.text
        if document.ends:
            whole.append(rest)
            rest = ""
    assert not rest
    return whole


def test_a_file_longer_than_a_block_is_cut_into_texts_and_parts(tmp_path):
    long = ["x" * 700_000, "y" * 1_100_000, "w" * 65_536, "z"]
    (tmp_path / "long.txt").write_text("\n<|sep|>\n".join(long))
    source = open_source(str(tmp_path / "long.txt"), separator="<|sep|>")
    everything = list(source.records(None))
    assert joined(document for _, document in everything) == long
    assert len(everything) == 22 + 34 + 1 + 1
    for number in (3, 40, 57):
        assert list(source.records(json.loads(json.dumps(everything[number - 1][0])))) == everything[number:]


class _CountingFile:
    """Counts the characters that were read."""

    def __init__(self, file):
        self.file, self.read_so_far = file, 0

    def read(self, size):
        block = self.file.read(size)
        self.read_so_far += len(block)
        return block


@pytest.mark.parametrize("line", ["y", "a line of words\n"])
def test_a_text_without_separators_never_waits_for_its_end(tmp_path, monkeypatch, line):
    """The reader holds one block and the longest text at most, so each block is handled once: time is linear."""
    monkeypatch.setattr(files_module, "_BLOCK_CHARACTERS", 20_000)
    path, opened = tmp_path / "a.txt", []
    path.write_text(line * (1_500_000 // len(line)) + "z")

    @contextmanager
    def counting(path):
        with open_text(path) as file:
            opened.append(_CountingFile(file))
            yield opened[-1]

    monkeypatch.setattr(files_module, "open_text", counting)
    given_so_far = most = 0
    for text in texts_one_by_one(open_source(str(path))):
        most = max(most, opened[0].read_so_far - given_so_far)
        given_so_far += len(text)
    assert given_so_far == opened[0].read_so_far == path.stat().st_size
    assert most <= 65_536 + 2 * 20_000


@pytest.mark.slow
def test_a_large_file_without_separators(tmp_path):
    """60 MB take a few seconds and no more memory than blocks do."""
    path = tmp_path / "a.txt"
    with path.open("w") as file:
        for number in range(60_000):
            file.write(f"{number:09} " * 100 + "\n")
    began = time.perf_counter()
    tracemalloc.start()
    size = sum(len(text) for text in texts_one_by_one(open_source(str(path))))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size == path.stat().st_size - 1  # without the newline at the end
    assert peak < 30e6 and time.perf_counter() - began < 60


def texts_one_by_one(source):
    return (document.text for _, document in source.documents(None))


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


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_long_rows_are_cut_and_reading_continues_at_every_part(tmp_path, name):
    rows = [{"text": "short"}, {"text": "word " * 20_000}, {"text": " \n"}, {"text": "a\n" * 40_000}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    source = open_source(str(tmp_path / name))
    everything = list(source.records(None))
    assert joined(document for _, document in everything) == [rows[number]["text"] for number in (0, 1, 3)]
    for number, (position, _) in enumerate(everything, start=1):
        rest = list(source.records(json.loads(json.dumps(position))))
        assert json.dumps(rest) == json.dumps(everything[number:])  # where tuples and lists are the same


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_positions_of_earlier_versions_are_read(files, name):
    assert texts(open_source(str(files / name)), [0, 4]) == stories(10)[4:]


def test_a_byte_order_mark_costs_no_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('{"text": "one"}\n{"text": "two"}'.encode("utf-8-sig"))
    (tmp_path / "a.txt").write_bytes("one<|endoftext|>two".encode("utf-8-sig"))
    for name in ("a.jsonl", "a.txt"):
        assert texts(open_source(str(tmp_path / name))) == ["one", "two"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_files_that_are_not_utf8_are_named_in_one_line(tmp_path, name):
    path = tmp_path / name
    for encoding, words in (("utf-16", "seems to be UTF-16"), ("latin-1", "not UTF-8 at byte 10")):
        path.write_bytes('{"text": "é"}'.encode(encoding))
        with pytest.raises(ValueError, match=rf"{name}: {words}") as raised:
            texts(open_source(str(path)))
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_a_file_that_vanished_is_one_line(files, name):
    source = open_source(str(files / name))
    (files / name).unlink()
    for use in (texts, lambda source: source.size()):
        with pytest.raises(ValueError, match=rf"{name}: cannot be read") as raised:
            use(source)
        assert "\n" not in str(raised.value)


def no_parquet(path):
    path.write_bytes(b"PAR1 and nothing of the kind")


def cut_in_the_middle(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def broken_page(path):
    content = bytearray(path.read_bytes())
    content[4:60] = b"\xff" * 56
    path.write_bytes(content)


def not_utf8_inside(path):
    text = pyarrow.Array.from_buffers(
        pyarrow.string(), 1, [None, pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"\xff\xfe")]
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), path)


@pytest.mark.parametrize("harm", [no_parquet, cut_in_the_middle, broken_page, not_utf8_inside])
def test_a_broken_parquet_file_is_named_in_one_line(files, harm):
    harm(files / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: cannot be read as Parquet \(") as raised:
        texts(open_source(str(files / "a.parquet")))
    assert "\n" not in str(raised.value)


def test_the_size_of_files(files):
    written = [(files / name).stat().st_size for name in ("a.txt", "a.jsonl")]
    assert [open_source(str(files / name)).size() for name in ("a.txt", "a.jsonl")] == written
    assert open_source(str(files)).size() > sum(written)


def test_the_size_of_a_parquet_file_is_that_of_its_text_unpacked(tmp_path):
    words = [f"{number} " + "word " * 2000 for number in range(20)]
    chats = [[{"role": "user", "content": text}] for text in words]
    pyarrow.parquet.write_table(pyarrow.table({"text": words, "id": words}), tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"messages": chats, "id": words}), tmp_path / "b.parquet")
    characters = sum(map(len, words))
    for name in ("a.parquet", "b.parquet"):
        assert (tmp_path / name).stat().st_size < characters / 2
        assert characters <= open_source(str(tmp_path / name)).size() < characters * 1.1


def test_an_empty_separator_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match=r"data\.separator ''"):
        open_source(str(tmp_path / "a.txt"), separator="")


def test_a_parquet_file_without_the_column_names_those_it_has(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"'text' or 'messages'; it has body"):
        texts(open_source(str(tmp_path / "a.parquet")))


def test_text_that_a_model_writes_is_no_source_to_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "a.txt").write_text("a text")
    with pytest.raises(ValueError, match=r"data source self: .* for calibration alone; a folder called so is \./self"):
        open_source("self")
    assert texts(open_source("./self")) == ["a text"]

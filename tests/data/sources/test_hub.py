import itertools
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from smolseek.data.documents import Columns
from smolseek.data.sources import HubSource, open_source
from smolseek.data.sources.hub import SourceLost, SourceUnreachable, parse_spec, pinned_spec
from tests.data.sources.hub_server import FlakyHub
from tests.data.sources.reading import texts
from tests.text import stories

ROOT = Path(__file__).parents[3]


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
from smolseek.data.documents import Columns
from smolseek.data.sources import HubSource
time.sleep = lambda seconds: None  # also the waits of the libraries
datasets.config.STREAMING_READ_MAX_RETRIES = 1
# Small reads, so that the connection closes inside a small shard.
fsspec.spec.AbstractBufferedFile.DEFAULT_BLOCK_SIZE = 1 << 12
datasets.load_dataset = functools.partial(datasets.load_dataset, chunksize=1 << 12)
for _, document in HubSource("hub:someone/text", Columns()).documents(None):
    print(document.text)
"""


def test_a_stream_that_breaks_off_mid_shard_loses_and_repeats_nothing(tmp_path):
    """Uses the real libraries and a server that closes connections; the libraries give up before we open again."""
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
    """Returns a hub source that takes its data sets from `opened`, one for each opening."""
    source = HubSource("hub:someone/text", Columns())
    monkeypatch.setattr("smolseek.data.sources.hub.RETRY_SECONDS", (0.0, 0.0, 0.0))
    monkeypatch.setattr(source, "_open", lambda: next(opened)())
    return source


class BrokenRows:
    """Rows of numbers; after `count` rows it raises `error`."""

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


@pytest.mark.parametrize(
    "error", [ConnectionResetError("reset"), TimeoutError(), EOFError(), SourceUnreachable("no hub")]
)
def test_every_break_is_read_on_from(monkeypatch, error):
    source = hub_source_of(monkeypatch, itertools.repeat(lambda: BrokenRows(3, error)))
    everything = list(source.documents(None))
    assert [document.text for _, document in everything] == [str(number) for number in range(1, 21)]
    for number, (position, _) in enumerate(everything, start=1):
        assert len(texts(source, position)) == 20 - number


def test_a_stream_that_stays_away_is_given_up_after_a_number_of_attempts(monkeypatch, caplog):
    def refuse():
        raise SourceUnreachable("no hub")

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
    with pytest.raises(ValueError, match=r"hub:someone/text: .*or name local files") as raised:
        next(open_source("hub:someone/text").documents(None))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("hub:a/b", ("a/b", None, None)),
        ("hub:b:config-1", ("b", None, "config-1")),
        ("hub:a/b@main", ("a/b", "main", None)),
        ("hub:a/b@refs/pr/1:config", ("a/b", "refs/pr/1", "config")),
    ],
)
def test_how_a_hub_data_set_is_written(spec, parts):
    assert parse_spec(spec) == parts


@pytest.mark.parametrize("spec", ["hub:", "hub:a/b@", "hub:a/b:", "hub::config", "hub:@main"])
def test_what_is_no_hub_data_set(spec):
    with pytest.raises(ValueError, match=r"written hub:OWNER/NAME\[@REVISION\]\[:CONFIG\]"):
        open_source(spec)


def test_the_revision_is_what_is_opened(monkeypatch):
    import datasets

    asked = []

    def load(*names, **options):
        asked.append((*names, options["revision"]))
        return datasets.Dataset.from_dict({"text": ["a"]}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    for spec in ("hub:a/b@main:config", "hub:a/b"):
        assert texts(open_source(spec)) == ["a"]
    assert asked == [("a/b", "config", "main"), ("a/b", None, None)]


class _Info:
    def __init__(self, **fields):
        self.__dict__.update(fields)


def test_a_spec_is_pinned_to_the_present_commit(monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda self, name, **options: _Info(sha=f"c0ffee-{name}"))
    assert pinned_spec("hub:a/b") == "hub:a/b@c0ffee-a/b"
    assert pinned_spec("hub:a/b:config") == "hub:a/b@c0ffee-a/b:config"
    for spec in ("hub:a/b@main:config", "builtin:python", "text/*.txt"):
        assert pinned_spec(spec) == spec


@pytest.mark.parametrize("error", [ConnectionError("offline"), ValueError("no id")])
def test_a_spec_stays_as_it_is_when_the_hub_is_away(monkeypatch, caplog, error):
    def refuse(*_args, **_options):
        raise error

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", refuse)
    assert pinned_spec("hub:a/b:config") == "hub:a/b:config"
    assert "commit is not known" in caplog.text


@pytest.mark.parametrize(
    ("splits", "size"),
    [({"train": _Info(num_bytes=123)}, 123), ({"train": _Info(num_bytes=None)}, None), ({}, None), (None, None)],
)
def test_the_size_is_what_the_hub_says(monkeypatch, splits, size):
    import datasets

    asked = []

    def load(*names, **options):
        asked.append((names, options))
        return _Info(info=_Info(splits=splits))

    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    assert open_source("hub:a/b@main:config").size() == size
    assert asked == [(("a/b", "config"), {"revision": "main"})]


def test_the_size_of_an_unreachable_data_set_is_one_line(monkeypatch):
    import datasets

    def refuse(*_args, **_options):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset_builder", refuse)
    with pytest.raises(SourceUnreachable, match=r"hub:a/b: cannot be opened .*or name local files") as raised:
        open_source("hub:a/b").size()
    assert "\n" not in str(raised.value)


def test_long_rows_are_cut_and_reading_continues_at_every_part(monkeypatch):
    import datasets

    rows = ["short", "word " * 20_000, " ", "a\n" * 40_000]
    source = HubSource("hub:someone/text", Columns())
    monkeypatch.setattr(source, "_open", lambda: datasets.Dataset.from_dict({"text": rows}).to_iterable_dataset())
    everything = list(source.records(None))
    assert "".join(document.text for _, document in everything) == rows[0] + rows[1] + rows[3]
    for number, (position, _) in enumerate(everything, start=1):
        rest = [document for _, document in source.records(json.loads(json.dumps(position)))]
        assert rest == [document for _, document in everything[number:]]


def test_a_sample_is_shuffled_by_the_seed_and_no_longer_than_needed(monkeypatch):
    import datasets

    rows = datasets.Dataset.from_dict({"text": stories(10)})
    source = HubSource("hub:someone/text", Columns())
    monkeypatch.setattr(source, "_open", lambda: rows.to_iterable_dataset(num_shards=2))
    one, again, other = ([document.text for document in source.sample(10**6, seed=seed)] for seed in (0, 0, 1))
    assert one == again != other and sorted(one) == sorted(other) == sorted(stories(10))
    few = source.sample(200, seed=0)
    assert sum(len(document.text) for document in few[:-1]) < 200 <= sum(len(document.text) for document in few)
    kept = source.sample(10**6, seed=0, keep=lambda document: "Anna" in document.text)
    assert {document.text for document in kept} == {text for text in stories(10) if "Anna" in text}


class _ShuffledRows(BrokenRows):
    """Rows in an order that the seed draws; each opening breaks off `count` rows later than the one before."""

    def shuffle(self, seed, buffer_size):
        return self

    def __iter__(self):
        for number in range(1, min(self.count, 20) + 1):
            yield {"text": f"{number:03}"}
        if self.count < 20:
            raise self.error


def test_a_sample_is_the_same_however_often_the_stream_breaks(monkeypatch):
    whole = hub_source_of(monkeypatch, iter([lambda: _ShuffledRows(20, None)])).sample(45, seed=0)
    breaks = iter([lambda count=count: _ShuffledRows(count, OSError("gone")) for count in (0, 3, 3, 9, 20)])
    assert hub_source_of(monkeypatch, breaks).sample(45, seed=0) == whole
    assert len(whole) == 15

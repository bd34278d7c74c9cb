import dataclasses
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smolseek.config import DataSettings, Recipe, TrainSettings
from smolseek.data.encoding import encode_text
from smolseek.data.sources import HubSource
from smolseek.data.splits import held_out_documents
from smolseek.data.statistics import measure_data, render
from tests.data.test_chat import CHATML, MESSAGES, tokenizer_with
from tests.text import stories, tiny_tokenizer, write_stories


def recipe_of(*sources, **data):
    train = TrainSettings(window_tokens=16)
    return Recipe(source="unused", data=DataSettings(train=sources, held_out_share=0.2, **data), train=train)


@pytest.fixture
def files(tmp_path):
    (tmp_path / "b.jsonl").write_text("\n".join([*(json.dumps({"text": t}) for t in stories(9, seed=3)), "{", "1"]))
    return str(write_stories(tmp_path / "a.txt")), str(tmp_path / "b.jsonl")


def test_counts_are_those_of_the_training_split(files):
    recipe = recipe_of(*files)
    statistics = measure_data(recipe, tiny_tokenizer(), limit=1, trained_tokens=960)
    kept_out = {document.text for document in held_out_documents(recipe.data)}
    for source, texts in zip(statistics.sources, (stories(), stories(9, seed=3)), strict=True):
        kept = [text for text in texts if text not in kept_out]
        assert source.documents == len(kept) and source.complete
        assert source.tokens == sum(len(encode_text(tiny_tokenizer(), text)) + 1 for text in kept)  # each ends in EOS
        assert source.bytes_per_token == pytest.approx(sum(map(len, kept)) / source.tokens, abs=1e-3)
        assert source.padding_share == 0 and source.loss_share == 1
        assert source.first_rows[0] == kept[0][:100] or source.first_rows[0].endswith("[...]")
    assert [source.malformed for source in statistics.sources] == [0, 2]
    held_out = sum(len(encode_text(tiny_tokenizer(), text)) + 1 for text in kept_out)
    assert statistics.held_out_tokens == held_out - 2  # an EOS between two documents of a source
    assert statistics.trained_tokens == 960
    sizes = [Path(source.source).stat().st_size for source in statistics.sources]
    for source, size in zip(statistics.sources, sizes, strict=True):  # mixed by size
        assert source.epochs == pytest.approx(960 * size / sum(sizes) / source.tokens)


def test_epochs_follow_the_weights(files):
    first, second = measure_data(
        recipe_of(*files, weights=(1.0, 3.0)), tiny_tokenizer(), limit=1, trained_tokens=960
    ).sources
    assert first.epochs == pytest.approx(240 / first.tokens) and second.epochs == pytest.approx(720 / second.tokens)


def test_a_hub_data_set_is_cut_and_says_so(files, monkeypatch):
    import datasets

    rows = {"text": stories(40)}
    monkeypatch.setattr(HubSource, "_open", lambda self: datasets.Dataset.from_dict(rows).to_iterable_dataset())
    monkeypatch.setattr(HubSource, "size", lambda self: None)
    with pytest.raises(ValueError, match=r"hub:some/text: its size is not known.*set data\.weights"):
        measure_data(recipe_of(files[0], "hub:some/text"), tiny_tokenizer(), limit=7, trained_tokens=960)
    statistics = measure_data(
        recipe_of(files[0], "hub:some/text", weights=(1.0, 1.0)), tiny_tokenizer(), limit=7, trained_tokens=960
    )
    local, hub = statistics.sources
    assert local.complete and not hub.complete and hub.documents == 7 and hub.epochs is None
    assert "hub:some/text: cut at 7 documents (--limit)" in render(statistics)


def test_conversations_tell_the_share_that_is_learnt(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join([json.dumps({"messages": MESSAGES})] * 5 + ["{}"]))
    recipe = recipe_of(str(tmp_path / "a.jsonl"), held_out=(str(tmp_path / "a.jsonl"),))
    (source,) = measure_data(recipe, tokenizer_with(CHATML), limit=1, trained_tokens=960).sources
    assert source.documents == 5 and source.malformed == 1 and 0.1 < source.loss_share < 0.9
    assert "Anna sees a ball" in source.first_rows[0]


def test_a_source_that_fills_no_window_tells_no_share(files):
    recipe = recipe_of(files[0])
    statistics = measure_data(
        dataclasses.replace(recipe, train=TrainSettings(window_tokens=10**6)),
        tiny_tokenizer(),
        limit=1,
        trained_tokens=9,
    )
    assert statistics.sources[0].loss_share is None and "     ?" in render(statistics)


def test_nothing_but_malformed_lines_is_one_line(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n[]\n")
    with pytest.raises(ValueError, match="no training text in it \\(2 malformed lines\\)"):
        measure_data(recipe_of(str(tmp_path / "a.jsonl")), tiny_tokenizer(), limit=1, trained_tokens=960)


WRONG_LINES = {
    '{"content": "a b"}\n'
    * 300: r"\(300 malformed lines\); .*line 1: no column 'text' or 'messages'; it has content: set "
    r"data\.text_column",
    '[\n  {\n    "text": "a b"\n  }\n]': r"line 1: no JSON object; write one JSON object a line",
    '{"text": 3}\n{"content": "a"}': r"line 1: no text in 'text' or messages in 'messages'; correct it",
}


@pytest.mark.parametrize("lines", WRONG_LINES)
def test_lines_without_text_are_told_of_with_their_fields(lines, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(lines)
    with pytest.raises(ValueError, match=WRONG_LINES[lines]) as raised:
        measure_data(recipe_of(str(path)), tiny_tokenizer(), limit=1, trained_tokens=960)
    assert "\n" not in str(raised.value) and "held_out_share" not in str(raised.value)


@pytest.mark.parametrize("wrong", ["empty", "column"])
def test_what_is_wrong_with_one_source_of_several(wrong, tmp_path):
    write_stories(tmp_path / "a.txt", count=20)
    other = tmp_path / "b.parquet" if wrong == "column" else tmp_path / "b.jsonl"
    other.touch()
    if wrong == "column":
        pq.write_table(pa.table({"content": ["a"]}), other)
    recipe = recipe_of(str(tmp_path / "a.txt"), str(other))
    said = {"empty": "is empty; leave it out", "column": "it has content: set data.text_column"}[wrong]
    with pytest.raises(ValueError, match=rf"b\.\w+: .*{said}"):
        measure_data(recipe, tiny_tokenizer(), limit=1, trained_tokens=960)

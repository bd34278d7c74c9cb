import json

import pytest
import torch

from smolseek.config import DataSettings
from smolseek.data.windows import (
    WindowStream,
    calibration_windows,
    encode_document,
    held_out_documents,
    pack,
    segments,
)
from tests.text import stories, tiny_tokenizer, write_stories


@pytest.fixture
def settings(tmp_path):
    return DataSettings(train=(str(write_stories(tmp_path / "a.txt")),), shuffle_windows=8, held_out_share=0.2)


def stream_of(settings, seed=0):
    return WindowStream(tiny_tokenizer(), settings, window_tokens=17, seed=seed)


def test_documents_begin_with_bos_and_decode_to_their_text():
    tokenizer = tiny_tokenizer()
    ids = encode_document(tokenizer, stories()[0])
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == stories()[0]


def test_no_token_is_lost_or_repeated_within_an_epoch(settings):
    """Packing wastes nothing: one epoch of windows is the training documents, end to end."""
    stream = stream_of(settings)
    windows = []
    while stream.epoch == 0:
        windows.append(stream._next_window())
    kept_out = {document.text for document in held_out_documents(settings)}
    wanted = [i for text in stories() if text not in kept_out for i in encode_document(tiny_tokenizer(), text)]
    got = torch.cat(windows).tolist()
    assert got[: len(wanted)] == wanted
    assert 0 < len(kept_out) < len(stories())


def test_windows_are_shuffled_by_the_seed(settings):
    first, again, other = (stream_of(settings, seed).next(4) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("batches", [0, 1, 7, 40])
def test_a_restored_stream_goes_on_with_the_same_windows(settings, batches):
    stream = stream_of(settings)
    for _ in range(batches):
        stream.next(3)
    plain, tensors = stream.state()
    restored = stream_of(settings)
    restored.restore(json.loads(json.dumps(plain)), tensors)
    for _ in range(120):
        assert torch.equal(stream.next(3), restored.next(3))
    assert stream.epoch == restored.epoch > 0


def test_segments_count_documents():
    ids = torch.tensor([[5, 0, 6, 7, 0, 8]])
    assert segments(ids, tiny_tokenizer()).tolist() == [[0, 1, 1, 1, 2, 2]]


def test_segments_without_bos_end_at_eos():
    class Tokenizer:
        bos_token_id = None
        eos_token_id = 9

    assert segments(torch.tensor([[5, 9, 6, 9, 8]]), Tokenizer()).tolist() == [[0, 0, 1, 1, 2]]


def test_pack_is_cut_at_the_limit_and_counts_bytes(settings):
    documents = list(held_out_documents(settings))
    ids_T, size = pack(tiny_tokenizer(), documents)
    assert size == sum(len(document.text.encode()) for document in documents)
    assert len(ids_T) == sum(len(encode_document(tiny_tokenizer(), document.text)) for document in documents)
    short_T, short_size = pack(tiny_tokenizer(), documents, 50)
    assert torch.equal(short_T, ids_T[:50]) and 0 < short_size < size


def test_held_out_text_is_never_trained_on(settings):
    stream = stream_of(settings)
    trained = " ".join(tiny_tokenizer().decode(window) for window in stream.next(200))
    for document in held_out_documents(settings):
        assert document.text not in trained


def test_own_held_out_sources_free_the_whole_training_text(settings, tmp_path):
    import dataclasses

    other = write_stories(tmp_path / "b.txt", 5, seed=9)
    settings = dataclasses.replace(settings, held_out=(str(other),))
    assert [document.text for document in held_out_documents(settings)] == stories(5, seed=9)


def test_empty_text_is_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="no training text"):
        stream_of(DataSettings(train=(str(tmp_path / "empty.txt"),))).next(1)


def test_calibration_windows_are_drawn_by_the_seed(tmp_path):
    path = str(write_stories(tmp_path / "a.txt"))
    options = {"windows": 6, "window_tokens": 16, "separator": "<|endoftext|>"}
    first, again, other = (calibration_windows(tiny_tokenizer(), [path], seed=s, **options) for s in (0, 0, 1))
    assert first.shape == (6, 16) and torch.equal(first, again) and not torch.equal(first, other)
    with pytest.raises(ValueError, match="less than one window"):
        calibration_windows(tiny_tokenizer(), [path], windows=1, window_tokens=10**6, separator="|", seed=0)

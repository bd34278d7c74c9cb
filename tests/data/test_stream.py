import dataclasses
import json
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smolseek.config import DataSettings
from smolseek.data.encoding import encode_text, read_marks
from smolseek.data.splits import held_out_documents
from smolseek.data.stream import SourceProgress, WindowStream, packed_windows
from tests.text import stories, tiny_tokenizer, write_stories


def stream_of(settings, seed=0):
    return WindowStream(tiny_tokenizer(), settings, window_tokens=17, seed=seed)


def test_no_token_is_lost_or_repeated_within_an_epoch(settings):
    """The windows of one epoch hold exactly the tokens of the training documents, one after the other."""
    windows = []
    for window, packing in stream_of(settings).windows():
        windows.append(read_marks(window)[0])
        if packing.readings[0].epoch:
            break
    kept_out = {document.text for document in held_out_documents(settings)}
    kept = [text for text in stories() if text not in kept_out]
    wanted = [i for text in kept for i in (*encode_text(tiny_tokenizer(), text), tiny_tokenizer().eos_token_id)]
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
    assert stream.packing.readings == restored.packing.readings
    assert all(reading.epoch > 0 for reading in stream.packing.readings)


def test_the_state_is_that_of_the_windows_handed_out(settings):
    """The state does not depend on how far ahead the thread is."""
    stream = stream_of(settings)
    stream.next(2)
    early = stream.state()
    while stream._prefetcher._queue.qsize() < 30:
        threading.Event().wait(0.01)
    late = stream.state()
    assert early[0] == late[0] and all(torch.equal(early[1][name], late[1][name]) for name in early[1])


def test_the_thread_ends_with_its_stream(settings):
    stream = stream_of(settings)
    stream.next(1)
    thread = next(t for t in threading.enumerate() if t.name == "smolseek-prefetch" and t.is_alive())
    del stream
    thread.join(timeout=10)
    assert not thread.is_alive()


def test_an_error_in_the_thread_is_raised_by_next_and_loses_nothing(settings, monkeypatch):
    stream, whole = stream_of(settings), stream_of(settings)
    batches = [whole.next(3) for _ in range(20)]
    first = stream.next(3)
    stream.close()
    records = stream.sources[0].records

    def broken(position):
        for number, record in enumerate(records(position)):
            if number == 2:
                raise OSError("gone")
            yield record

    with monkeypatch.context() as patch:
        patch.setattr("smolseek.data.stream._DOCUMENTS_AT_ONCE", 1)
        patch.setattr(stream.sources[0], "records", broken)
        got = [first]
        for _ in range(2):
            with pytest.raises(OSError, match="gone"):
                while True:
                    got.append(stream.next(3))
    state = stream.state()
    stream.restore(*state)
    got += [stream.next(3) for _ in range(20 - len(got))]
    assert all(torch.equal(a, b) for a, b in zip(got, batches, strict=True))


def weighted(tmp_path, *weights):
    paths = [str(write_stories(tmp_path / f"{n}.txt", count=4 + 30 * n, seed=n)) for n in range(len(weights))]
    return DataSettings(train=tuple(paths), weights=weights, shuffle_windows=4, held_out=(paths[0],))


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0), (1.0, 6.0, 3.0)])
def test_weights_are_shares_of_tokens(tmp_path, weights):
    """The sources have 4, 34 and 64 documents; the small ones are read many times."""
    stream = stream_of(weighted(tmp_path, *weights))
    stream.next(3000)
    tokens = [reading.tokens for reading in stream.packing.readings]
    longest = 160  # no document has more tokens
    for got, weight in zip(tokens, weights, strict=True):
        assert abs(got - sum(tokens) * weight / sum(weights)) < 2 * longest
    assert stream.packing.readings[0].epoch > 3


@pytest.mark.parametrize("batches", [1, 33])
def test_a_weighted_stream_is_restored_in_its_own_epochs(tmp_path, batches):
    settings = weighted(tmp_path, 2.0, 1.0)
    stream, restored = stream_of(settings), stream_of(settings)
    for _ in range(batches):
        stream.next(5)
    plain, tensors = stream.state()
    restored.next(7)  # restore also works on a stream that has run already
    restored.restore(json.loads(json.dumps(plain)), tensors)
    assert all(torch.equal(stream.next(5), restored.next(5)) for _ in range(60))
    assert stream.packing.readings == restored.packing.readings


@pytest.mark.parametrize(
    ("weights", "words"), [((1.0,), "1 for 2 sources"), ((1.0, 0.0), "above 0"), ((1.0, -1.0), "above 0")]
)
def test_weights_that_do_not_fit(tmp_path, weights, words):
    settings = dataclasses.replace(weighted(tmp_path, 1.0, 1.0), weights=weights)
    with pytest.raises(ValueError, match=words):
        stream_of(settings)


def test_sources_without_weights_are_mixed_by_size(tmp_path):
    """Every source is read from the first steps on, and all are read through at about the same time."""
    stream = stream_of(dataclasses.replace(weighted(tmp_path, 1.0, 1.0, 1.0), weights=()))
    stream.next(150)
    readings = stream.packing.readings
    sizes = [source.size() for source in stream.sources]
    assert all(reading.tokens > 0 for reading in readings)
    for reading, size in zip(readings[1:], sizes[1:], strict=True):
        share = reading.tokens / sum(r.tokens for r in readings)
        assert share == pytest.approx(size / sum(sizes), abs=0.1)


def test_the_state_of_other_sources_is_refused(tmp_path, settings):
    plain, tensors = stream_of(weighted(tmp_path, 1.0, 1.0)).state()
    with pytest.raises(ValueError, match=r"training state of 2 sources, and data\.train has 1"):
        stream_of(settings).restore(plain, tensors)


def test_the_first_tokens_of_each_source_are_read_before_a_run(tmp_path):
    stream = stream_of(weighted(tmp_path, 1.0, 1.0))
    firsts = [tiny_tokenizer().decode(tokens_T[0], skip_special_tokens=True) for tokens_T in stream.first_tokens()]
    assert firsts == [stories(4, seed=0)[0], stories(34, seed=1)[0]]
    (tmp_path / "1.txt").write_text("\n")
    with pytest.raises(ValueError, match="no training text in it"):
        list(stream_of(weighted(tmp_path, 1.0)).first_tokens()) + list(
            stream_of(DataSettings(train=(str(tmp_path / "1.txt"),))).first_tokens()
        )


def test_malformed_lines_are_counted_once_whatever_is_restored(tmp_path):
    lines = [json.dumps({"text": text}) for text in stories(20)]
    lines[3:3] = ["{broken", '{"other": 1}']
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "[1]"]))
    settings = DataSettings(train=(str(tmp_path / "a.jsonl"),), held_out=("unused.txt",), shuffle_windows=4)
    stream = stream_of(settings)
    while not stream.packing.readings[0].epoch:
        stream.next(1)
        plain, tensors = stream.state()
        stream = stream_of(settings)
        stream.restore(json.loads(json.dumps(plain)), tensors)
    assert stream.malformed in (3, 5)  # 5 if the next epoch has reached them
    assert stream.packing.readings[0].documents >= 20


def test_marks_are_the_first_tokens_of_documents(settings):
    windows = stream_of(settings).next(50)
    ids, loss, segments = read_marks(windows)
    assert loss.all()
    after_end = torch.nn.functional.pad(ids[:, :-1] == tiny_tokenizer().eos_token_id, (1, 0))
    assert torch.equal(segments - segments[:, :1], after_end.cumsum(-1))


@given(st.lists(st.tuples(st.integers(1, 30), st.booleans()), min_size=1, max_size=8), st.integers(2, 20))
def test_packing_keeps_every_token_and_mark(documents, window_tokens):
    """For documents and windows of any size, the windows hold the marked tokens of the documents in their order."""
    tokens = [torch.arange(size, dtype=torch.int32) | (1 << 29 if masked else 0) for size, masked in documents]
    for document in tokens:
        document[0] |= 1 << 30
    reader = _Cycle(tokens)
    windows = packed_windows([reader], (1.0,), torch.empty(0, dtype=torch.int32), window_tokens)
    got = torch.cat([next(windows)[0] for _ in range(30)])
    once = torch.cat(tokens)
    assert torch.equal(got, once.repeat(len(got) // len(once) + 1)[: len(got)])
    ids, loss, _ = read_marks(got)
    assert ids.max() < 30
    assert torch.equal(loss, (got & (1 << 29)) == 0)


class _Cycle:
    """A reader that repeats the same documents."""

    def __init__(self, documents):
        self.documents, self.given, self.progress = documents, 0, SourceProgress()

    def next(self):
        self.given += 1
        return self.documents[(self.given - 1) % len(self.documents)]


def test_held_out_text_is_never_trained_on(settings):
    stream = stream_of(settings)
    trained = " ".join(tiny_tokenizer().decode(window) for window in read_marks(stream.next(200))[0])
    for document in held_out_documents(settings):
        assert document.text not in trained


def test_empty_text_is_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="no training text"):
        stream_of(DataSettings(train=(str(tmp_path / "empty.txt"),))).next(1)

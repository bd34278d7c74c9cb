import pytest
import torch

from smolseek.data.encoding import encode_document
from smolseek.data.packing import calibration_windows, pack
from smolseek.data.splits import held_out_documents
from tests.text import tiny_tokenizer, write_stories


def test_pack_is_cut_at_the_limit_and_counts_bytes(settings):
    documents = list(held_out_documents(settings))
    ids_T, counts_T, size = pack(tiny_tokenizer(), documents)
    assert counts_T.all() and counts_T.shape == ids_T.shape
    assert size == sum(len(document.text.encode()) for document in documents)
    assert len(ids_T) == sum(len(encode_document(tiny_tokenizer(), document.text)) for document in documents)
    short_T, _, short_size = pack(tiny_tokenizer(), documents, 50)
    assert torch.equal(short_T, ids_T[:50]) and 0 < short_size < size


def test_calibration_windows_are_drawn_by_the_seed(tmp_path):
    path = str(write_stories(tmp_path / "a.txt"))
    options = {"windows": 6, "window_tokens": 16, "separator": "<|endoftext|>"}
    first, again, other = (calibration_windows(tiny_tokenizer(), [path], seed=s, **options) for s in (0, 0, 1))
    assert first.shape == (6, 16) and torch.equal(first, again) and not torch.equal(first, other)
    with pytest.raises(ValueError, match="less than one window"):
        calibration_windows(tiny_tokenizer(), [path], windows=1, window_tokens=10**6, separator="|", seed=0)

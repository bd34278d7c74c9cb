import pytest
import torch

from smolseek.data import packing
from smolseek.data.documents import Document
from smolseek.data.packing import join, pack
from smolseek.data.splits import held_out_documents
from tests.text import KINDS, kind_of_tokenizer, stories, tiny_tokenizer


def test_pack_is_cut_at_the_limit_and_counts_bytes(settings):
    documents = list(held_out_documents(settings))
    ids_T, counts_T, size = pack(tiny_tokenizer(), documents)
    assert counts_T.all() and counts_T.shape == ids_T.shape
    assert size == sum(len(document.text.encode()) for document in documents)
    short_T, _, short_size = pack(tiny_tokenizer(), documents, 50)
    assert torch.equal(short_T, ids_T[:50]) and 0 < short_size < size


@pytest.mark.parametrize("kind", KINDS)
def test_documents_are_parted_by_the_tokenizers_bos_or_else_by_eos(kind):
    tokenizer, texts = kind_of_tokenizer(kind), stories()[:3]
    first, second, third = (tokenizer(text)["input_ids"] for text in texts)
    between = [] if kind in ("adds", "sentencepiece") else [tokenizer.eos_token_id]
    packed = pack(tokenizer, [Document(text, text) for text in texts])
    assert packed.ids_T.tolist() == [*first, *between, *second, *between, *third]
    assert pack(tokenizer, [Document("", texts[0])]).ids_T.tolist() == first


def test_the_parts_of_a_long_text_are_one_text(monkeypatch):
    tokenizer = kind_of_tokenizer("sentencepiece")
    text = " ".join(stories())
    parts = [Document("", text[i : i + 100], ends=i + 100 >= len(text)) for i in range(0, len(text), 100)]
    assert pack(tokenizer, parts).ids_T.tolist() == tokenizer(text)["input_ids"]
    assert pack(tokenizer, parts[:-1]).ids_T.tolist() == tokenizer(text[: 100 * (len(parts) - 1)])["input_ids"]
    monkeypatch.setattr(packing, "_LONGEST_CHARACTERS", 250)  # memory is bounded: three parts at once
    assert (pack(tokenizer, parts).ids_T == tokenizer.bos_token_id).sum() == -(-len(parts) // 3)


def test_streams_are_joined_and_cut_with_their_bytes():
    streams = [pack(tiny_tokenizer(), [Document(text, text)]) for text in stories()[:2]]
    both = join(streams)
    assert both.text_bytes == sum(stream.text_bytes for stream in streams)
    assert both.cut(len(streams[0].ids_T)).ids_T.tolist() == streams[0].ids_T.tolist()
    assert both.cut(0).text_bytes == 0

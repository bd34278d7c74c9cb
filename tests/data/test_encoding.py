import torch

from smolseek.data.documents import Document
from smolseek.data.encoding import encode_document, encode_marked, read_marks
from tests.text import stories, tiny_tokenizer


def test_documents_begin_with_bos_and_decode_to_their_text():
    tokenizer = tiny_tokenizer()
    ids = encode_document(tokenizer, stories()[0])
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == stories()[0]


def test_documents_without_bos_are_marked_too():
    class Tokenizer:
        bos_token_id, eos_token_id = None, 9

        def __call__(self, texts, **_options):
            return {"input_ids": [[len(text)] * 2 for text in texts]}

    windows = torch.cat(list(encode_marked(Tokenizer(), [Document("a", "a"), Document("b", "bb")])))
    ids, _, segments = read_marks(windows)
    assert ids.tolist() == [1, 1, 9, 2, 2, 9] and segments.tolist() == [1, 1, 1, 2, 2, 2]

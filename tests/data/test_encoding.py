import itertools

import pytest
import torch

from smolseek.data.documents import Document
from smolseek.data.encoding import (
    added_start,
    check_vocabulary,
    encode_marked,
    encode_prompt,
    encode_text,
    read_marks,
)
from tests.text import KINDS, kind_of_tokenizer, stories


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_tokenizer(kind):
    tokenizer, text = kind_of_tokenizer(kind), " Anna sees\n\na ball </s> é. " * 900
    assert encode_text(tokenizer, text) == tokenizer(text)["input_ids"]
    adds = kind in ("adds", "sentencepiece")
    assert added_start(tokenizer) == ([tokenizer.bos_token_id] if adds else [])
    assert (encode_text(tokenizer, text)[0] == tokenizer.bos_token_id) == adds
    assert encode_prompt(tokenizer, "") == ([] if kind == "none" else [tokenizer.bos_token_id])


def test_a_chat_prompt_ends_where_the_answer_begins():
    tokenizer = kind_of_tokenizer("has")
    tokenizer.chat_template = "U: {{ messages[0]['content'] }}{% if add_generation_prompt %} A:{% endif %}"
    assert encode_prompt(tokenizer, "Anna?", chat=True) == encode_text(tokenizer, "U: Anna? A:")


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_text_ends_in_eos_once_and_a_part_of_it_does_not(kind):
    tokenizer = kind_of_tokenizer(kind)
    texts = [*stories()[:3], stories()[3] + "</s>"]
    documents = [Document(text, text) for text in texts]
    documents[0] = documents[0]._replace(ends=False)
    ids, learnt, segments = read_marks(torch.cat(list(encode_marked(tokenizer, documents))))
    end = [tokenizer.eos_token_id]
    wanted = [tokenizer(text)["input_ids"] + more for text, more in zip(texts, ([], end, end, []), strict=True)]
    assert ids.tolist() == list(itertools.chain(*wanted)) and learnt.all()
    assert segments.tolist() == [number for number, part in enumerate(wanted, start=1) for _ in part]


def test_tokens_beyond_the_model_are_named():
    check_vocabulary(torch.tensor([[0, 9]]), 10)
    check_vocabulary(torch.tensor([]), 10)
    with pytest.raises(ValueError, match="token 10: the model has 10 vocabulary entries, the tokenizer more"):
        check_vocabulary(torch.tensor([[3, 10]]), 10)

from smolseek.config import PROSE, SEPARATOR
from smolseek.data.sources import open_source


def test_prose_is_many_documents_of_many_kinds():
    texts = [document.text for _, document in open_source(PROSE).documents(None)]
    assert len(texts) == len(set(texts)) > 110 and sum(map(len, texts)) > 650_000
    assert all(2000 < len(text) < 25_000 and SEPARATOR not in text and "\ufffd" not in text for text in texts)
    assert any("\ndef " in text for text in texts)


def test_prose_is_read_whatever_separates_the_documents_of_other_text():
    whole, cut = (open_source(PROSE, separator=separator).documents(None) for separator in (SEPARATOR, "\n"))
    assert [document for _, document in whole] == [document for _, document in cut]
